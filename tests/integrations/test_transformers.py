"""transformers' signature: every argument works or is refused by name; numbers are those of transformers; export."""

from __future__ import annotations

import inspect
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_twin import BIASES, TINY, pad, random_ids, twins
from torch.export import Dim, ExportedProgram
from transformers import ModernBertModel

from modernbert.config import FULL, SLIDING
from modernbert.encoder import EncoderOutput
from modernbert.integrations.transformers import TransformersEncoder

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
SMALL = replace(TINY, num_hidden_layers=2, layer_pattern=(FULL, SLIDING))


@pytest.fixture(scope="module")
def encoder() -> TransformersEncoder:
    return TransformersEncoder(twins(replace(SMALL, **BIASES))[1])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0)])
def test_an_empty_batch(encoder: TransformersEncoder, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    out = encoder(ids, torch.ones_like(ids), output_hidden_states=True)
    assert out.last_hidden_state.shape == (*shape, 64)
    assert len(out.hidden_states) == 3


def test_every_argument_of_transformers_has_a_meaning_or_is_refused_by_name(encoder: TransformersEncoder) -> None:
    theirs = set(inspect.signature(inspect.unwrap(ModernBertModel.forward)).parameters) - {"self", "kwargs"}
    # What transformers 4 took, and what passes through the keyword arguments of 5.
    theirs |= {"token_type_ids", "output_attentions", "output_hidden_states", "return_dict"}
    ours = inspect.signature(encoder.forward).parameters
    assert theirs <= set(ours)
    assert not any(p.kind is p.VAR_KEYWORD for p in ours.values())
    mask = torch.ones_like(IDS)
    wanted = encoder(IDS).last_hidden_state
    defaults = dict.fromkeys(["output_attentions", "output_hidden_states", "return_dict", "token_type_ids"])
    for given in ({}, defaults, {"return_dict": True, "output_attentions": False}):
        out = encoder(input_ids=IDS, attention_mask=mask, position_ids=None, inputs_embeds=None, **given)
        assert isinstance(out, EncoderOutput)
        assert torch.equal(out.last_hidden_state, wanted)
        assert torch.equal(out[0], wanted)
    for name, value in (
        ("token_type_ids", torch.zeros_like(IDS)),
        ("return_dict", False),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            encoder(IDS, **{name: value})
    for name in ("labels", "cu_seqlens", "sliding_window_mask", "past_key_values"):
        with pytest.raises(TypeError, match=name):
            encoder(IDS, **{name: IDS})


def test_arguments_that_contradict(encoder: TransformersEncoder) -> None:
    for arguments in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(2, 4, 64)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            encoder(**arguments)


def test_query_rows_under_compile() -> None:
    encoder = TransformersEncoder(twins(SMALL)[1])
    compiled = torch.compile(encoder, backend="aot_eager")
    ids, mask = pad(random_ids([3, 40, 17], 100))
    with torch.no_grad():
        got, wanted = (model(ids, mask, query_mask=1 - mask)[0] for model in (compiled, encoder))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * (1 + wanted.abs().max().item()))


# Query-only rows


def test_unattended_expansion_rows_are_those_of_transformers() -> None:
    """Masks by hand, 4-D, one for each kind of layer, because transformers has no argument for them.

    Some rows are farther from the real tokens than the window, so that local layers show them nothing.
    """
    theirs, inner = twins(replace(TINY, **BIASES))
    ours = TransformersEncoder(inner)
    length, real, expanded = 40, [3, 40, 17, 12], [30, 0, 5, 28]
    ids = torch.tensor(random_ids([length] * 4, 100))
    place = torch.arange(length)
    keys = torch.stack([place < n for n in real])
    queries = torch.stack([(place >= n) & (place < n + m) for n, m in zip(real, expanded, strict=True)])
    near = (place[:, None] - place).abs() <= TINY.window
    masks = {"full_attention": keys[:, None, None, :].expand(-1, 1, length, -1)}
    masks["sliding_attention"] = masks["full_attention"] & near
    assert (~masks["sliding_attention"].any(-1)[:, 0] & queries).any()
    got, wanted = ours(ids, keys, query_mask=queries), theirs(ids, attention_mask=masks)
    rows = keys | queries
    torch.testing.assert_close(got[0][rows], wanted[0][rows], rtol=0, atol=2e-5)
    assert got[0][~rows].eq(0).all()

    # The real tokens do not notice the expansion, and it does not stand in the way of gradients.
    alone = ours(ids, keys).last_hidden_state
    torch.testing.assert_close(got[0][keys], alone[keys], rtol=0, atol=2e-5)
    weights = torch.randn_like(got[0][rows])
    for out in (got, wanted):
        grads = torch.autograd.grad((out[0][rows] * weights).sum(), list(ours.parameters()))
        if out is got:
            ours_grads = grads
    for (name, _), mine, yours in zip(ours.named_parameters(), ours_grads, grads, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-4 * yours.abs().max().item(), msg=name)


# Export


@pytest.fixture(scope="module")
def program(encoder: TransformersEncoder) -> ExportedProgram:
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return torch.export.export(encoder, pad(random_ids([3, 40, 17], 100)), dynamic_shapes=(sizes, sizes))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[3, 40, 17], [100, 2], [5, 7, 64, 65, 130], [33]])
def test_an_exported_program_at_other_sizes(
    program: ExportedProgram, encoder: TransformersEncoder, side: str, lengths: list[int]
) -> None:
    ids, mask = pad(random_ids(lengths, 100), side, extra=3)
    with torch.no_grad():
        got, wanted = program.module()(ids, mask), encoder(ids, mask)
    torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=2e-5)
    assert got.last_hidden_state[mask == 0].eq(0).all()


def test_an_exported_program_is_saved_and_loaded(program: ExportedProgram, encoder: TransformersEncoder) -> None:
    """Saving failed, because the class of the output was not known to torch's serialiser."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    ids, mask = pad(random_ids([5, 9], 100), "left")
    with torch.no_grad():
        got = torch.export.load(file).module()(ids, mask)
        torch.testing.assert_close(got.last_hidden_state, encoder(ids, mask)[0], rtol=0, atol=2e-5)


OTHERS = {
    "position_ids": ("input_ids", "attention_mask", "position_ids"),
    "inputs_embeds": ("inputs_embeds", "attention_mask"),
    "no mask": ("input_ids",),
}


@pytest.mark.parametrize(("name", "strict"), [(name, False) for name in OTHERS] + [("position_ids", True)])
def test_export_of_the_other_arguments(encoder: TransformersEncoder, name: str, strict: bool) -> None:
    """Positions, embeddings, no mask; hidden states; strict is with dynamo. All sizes are open."""
    ids, mask = pad(random_ids([3, 40, 17], 100), "left")
    known = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": ids,
        "inputs_embeds": torch.randn(3, 40, 64),
    }
    arguments = {key: known[key] for key in OTHERS[name]}
    sizes: dict[str, Any] = {key: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for key in arguments}
    sizes["output_hidden_states"] = None
    options = {"output_hidden_states": True}
    program = torch.export.export(encoder, (), {**arguments, **options}, dynamic_shapes=sizes, strict=strict)
    others = {key: torch.cat([x, x])[:5, -20:] for key, x in arguments.items()}
    with torch.no_grad():
        got, wanted = program.module()(**others, **options), encoder(**others, **options)
    assert len(got.hidden_states) == 3
    for mine, yours in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-5)


def test_query_rows_are_exported(encoder: TransformersEncoder) -> None:
    """They were refused, as if they were padding."""
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}

    def arguments(lengths: list[int], side: str) -> dict[str, torch.Tensor]:
        ids, mask = pad(random_ids(lengths, 100), side, extra=2)
        keys = mask * (mask.cumsum(1) < 8)
        return {"input_ids": ids, "attention_mask": keys, "query_mask": mask - keys}

    given = arguments([3, 40, 17], "left")
    program = torch.export.export(encoder, (), given, dynamic_shapes=dict.fromkeys(given, sizes), strict=False)
    for lengths, side in (([9, 30], "right"), ([30], "left"), ([1, 8, 12, 50], "left")):
        given = arguments(lengths, side)
        with torch.no_grad():
            got, wanted = program.module()(**given)[0], encoder(**given)[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
