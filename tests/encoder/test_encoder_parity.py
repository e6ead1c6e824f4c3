"""The encoder gives transformers' numbers: every preset and variant, every way in, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from hf_twin import BIASES, TINY, exact_rotary, hf_dict, pad, random_ids, twins
from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert

from modernbert import Encoder, EncoderConfig, pack
from modernbert.config import FULL, PRESETS, SLIDING
from modernbert.integrations.transformers import TransformersEncoder
from modernbert_kernels import backend

LIMIT = 1e-4  # the bar of the project for float32. The weights are loud; most differences stay below 2e-5.
LENGTHS = [1, 2, 64, 65, 66, 129, 130, 512]

# Depth and vocabulary are cut so that all of them fit in memory and minutes: ids only pick rows of the table,
# and three layers are one whole pattern. The other fields are the published ones.
FULL_DEPTH = {"ettin-17m", "ettin-32m", "modernbert-base"}
CASES = {
    name: replace(config, vocab_size=1000, pad_token_id=None)
    if name in FULL_DEPTH
    else replace(config, vocab_size=1000, pad_token_id=None, num_hidden_layers=3)
    for name, config in PRESETS.items()
}
GRANITE = replace(  # head width 32, last layer local
    TINY,
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=12,
    local_attention=128,
    global_rope_theta=80_000.0,
)
CASES |= {
    "granite-small": GRANITE,
    "granite-97m": replace(GRANITE, hidden_activation="silu", global_rope_theta=150_000.0, local_rope_theta=160_000.0),
    "mmBERT-small": replace(
        GRANITE,
        intermediate_size=1152,
        num_hidden_layers=4,
        num_attention_heads=6,
        global_rope_theta=160_000.0,
        local_rope_theta=160_000.0,
    ),
    "all biases": replace(TINY, **BIASES),
    "silu": replace(TINY, hidden_activation="silu", norm_eps=1e-3),
    "odd window": replace(TINY, local_attention=33),
    "all global": replace(TINY, layer_pattern=(FULL,)),
    "all local": replace(TINY, layer_pattern=(SLIDING,)),
    "irregular": replace(TINY, layer_pattern=(SLIDING, FULL, FULL, SLIDING)),
}


def worst(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return (got - wanted).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_a_ragged_batch_is_each_text_alone_in_transformers(name: str) -> None:
    """Texts in one row do not see one another, as they did in silence elsewhere: transformers#46851."""
    config = CASES[name]
    lengths = LENGTHS[:-1] if config.hidden_size > 512 else LENGTHS  # a wide model takes seconds for 512 tokens
    theirs, ours = twins(config)
    texts = random_ids(lengths, config.vocab_size)
    batch = pack(texts, vocab_size=config.vocab_size)
    with torch.inference_mode():
        packed = ours(batch).split(batch.lengths)
        for ids, rows in zip(texts, packed, strict=True):
            wanted = theirs(torch.tensor([ids])).last_hidden_state[0]
            assert worst(rows, wanted) <= LIMIT, f"length {len(ids)}"
            assert rows.std() > 0.5, "the weights are so quiet that the test says nothing"


def test_a_text_of_3000_tokens() -> None:
    theirs, ours = twins(replace(CASES["ettin-17m"], num_hidden_layers=4))  # two of them are global
    texts = random_ids([7, 3000, 65], 1000)
    with torch.inference_mode():
        batch = pack(texts)
        wanted = theirs(torch.tensor([texts[1]])).last_hidden_state[0]
        assert worst(ours(batch).split(batch.lengths)[1], wanted) <= LIMIT
        with backend("reference"):
            assert worst(ours(pack(texts[1:2])), wanted) <= LIMIT


def test_a_text_beyond_8192_tokens() -> None:
    """Longer than the position limit: a warning, and still transformers."""
    theirs, ours = twins(replace(TINY, num_hidden_layers=2))  # one is global, one local
    (text,) = random_ids([8200], 100)
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="longer than max_position_embeddings, 8192"):
            rows = ours(pack([text]))
        assert worst(rows, theirs(torch.tensor([text])).last_hidden_state[0]) <= LIMIT


@pytest.mark.parametrize("name", ["ettin-17m", "all biases"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_packed_and_alone_are_equal(name: str, side: str) -> None:
    """Four ways in, and transformers' padded batch, where positions count padding on the left.

    In sentence-transformers#3879 positions were shifted where texts were flattened.
    """
    config = CASES[name]
    theirs, ours = twins(config)
    texts = random_ids(LENGTHS[:-1], config.vocab_size)
    ids, mask = pad(texts, side, extra=3)
    with torch.inference_mode():
        wanted = theirs(ids, attention_mask=mask).last_hidden_state
        got = ours(ids, mask).last_hidden_state
        assert worst(got[mask.bool()], wanted[mask.bool()]) <= LIMIT
        assert got[~mask.bool()].eq(0).all()
        together = ours(pack(texts))
        assert worst(together, got[mask.bool()]) <= LIMIT
        for text, rows in zip(texts, together.split([len(text) for text in texts]), strict=True):
            assert worst(ours(pack([text])), rows) <= LIMIT
            assert worst(ours(torch.tensor([text])).last_hidden_state[0], rows) <= LIMIT


@pytest.mark.parametrize("name", ["ettin-17m", "granite-97m", "all biases", "irregular"])
def test_reference_ops_are_transformers_too(name: str) -> None:
    theirs, ours = twins(CASES[name])
    texts = random_ids(LENGTHS[:-1], CASES[name].vocab_size)
    ids, mask = pad(texts)
    with torch.inference_mode(), backend("reference"):
        wanted = theirs(ids, attention_mask=mask).last_hidden_state
        assert worst(ours(ids, mask).last_hidden_state[mask.bool()], wanted[mask.bool()]) <= LIMIT


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_rope_theta": 160_000.0},
        {"global_rope_theta": 10_000.0},
        {"local_attention": 126},
        {"norm_eps": 1e-3},
        {"hidden_activation": "silu"},
    ],
)
def test_each_field_matters(wrong: dict[str, Any]) -> None:
    """The weights and texts of this file would show a wrong theta, a window off by one (vllm#44040), and so on."""
    base = replace(TINY, local_attention=128)
    _, right = twins(base)
    other = Encoder(replace(base, **wrong)).eval()
    other.load_state_dict(right.state_dict())
    batch = pack(random_ids([130], base.vocab_size))
    with torch.inference_mode():
        assert worst(right(batch), other(batch)) > 20 * LIMIT


@pytest.mark.parametrize("config", [TINY, replace(TINY, num_hidden_layers=6, local_rope_theta=160_000.0)])
def test_both_generations_of_config_are_one_model(config: EncoderConfig) -> None:
    batch, (theirs4, ours4), (_, ours5) = pack([[5, 6, 7] * 20]), twins(config, generation=4), twins(config)
    assert "global_attn_every_n_layers" in hf_dict(config, 4)
    assert "layer_types" in hf_dict(config, 5)
    with torch.inference_mode():
        assert torch.equal(ours4(batch), ours5(batch))
        assert worst(ours4(batch), theirs4(batch.input_ids[None]).last_hidden_state[0]) <= LIMIT


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_are_those_of_transformers_5(layers: int, side: str) -> None:
    """N + 1 of them; the last is after the final norm. Of large batches too."""
    theirs, ours = twins(replace(TINY, num_hidden_layers=layers, **BIASES))
    for texts in (random_ids([3, 40, 17], 100), random_ids([500, 480, 510, 490, 470, 5], 100)):
        ids, mask = pad(texts, side)
        real = mask.bool()
        with torch.inference_mode():
            wanted = theirs(ids, attention_mask=mask, output_hidden_states=True)
            padded = TransformersEncoder(ours)(ids, mask, output_hidden_states=True)
        assert len(padded.hidden_states) == layers + 1
        assert torch.equal(padded.hidden_states[-1], padded.last_hidden_state)
        for mine, yours in zip(padded.hidden_states, wanted.hidden_states, strict=True):
            assert worst(mine[real], yours[real]) <= LIMIT
            assert mine[~real].eq(0).all()
        assert TransformersEncoder(ours)(ids, mask).hidden_states is None


def test_hooks_on_layers_see_the_residual_stream() -> None:
    """Of a packed batch, as the docstring of `Layer` says: `x + delta` after a layer is transformers' hidden state."""
    theirs, ours = twins(TINY)
    texts = random_ids([3, 40, 17], 100)
    ids, mask = pad(texts)
    seen: list[Tensor] = []
    for layer in ours.layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output[0] + output[1]))
    with torch.inference_mode():
        ours(pack(texts))
        wanted = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:-1]
    for mine, yours in zip(seen[:-1], wanted, strict=True):
        assert worst(mine, yours[mask.bool()]) <= LIMIT


def test_inputs_embeds() -> None:
    """In place of rows of the table; they are normed as those are. Padded, packed, values and gradients."""
    theirs, ours = twins(TINY)
    texts = random_ids([3, 40, 17], 100)
    ids, mask = pad(texts, "left")
    real = mask.bool()
    embeds = torch.randn(3, 40, 64)
    outputs, gradients = [], []
    for run in (
        lambda x: theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state[real],
        lambda x: ours(inputs_embeds=x, attention_mask=mask).last_hidden_state[real],
        lambda x: ours(None, mask, inputs_embeds=x).last_hidden_state[real],
        lambda x: ours(pack(ids, mask), inputs_embeds=x[real]),
    ):
        leaf = embeds.clone().requires_grad_()
        outputs.append(run(leaf))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), leaf)[0])
    for output, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert worst(output, outputs[0]) <= LIMIT
        # Two float32 backward passes agree to four digits; the exact comparison is below.
        assert worst(gradient, gradients[0]) <= 1e-4 * gradients[0].abs().max()
        assert gradient[~real].eq(0).all()
    with torch.inference_mode():
        rows = ours.embeddings.tok_embeddings.weight[ids]
        assert worst(ours(ids, mask)[0], ours(None, mask, inputs_embeds=rows)[0]) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids(side: str) -> None:
    theirs, ours = twins(TINY)
    ids, mask = pad(random_ids([3, 40, 17], 100), side)
    real = mask.bool()
    steps = torch.randint(1, 4, ids.shape).cumsum(1)
    with torch.inference_mode():
        for positions in (steps, steps[:1]):
            wanted = theirs(ids, attention_mask=mask, position_ids=positions).last_hidden_state
            got = TransformersEncoder(ours)(ids, mask, position_ids=positions).last_hidden_state
            assert worst(got[real], wanted[real]) <= LIMIT
        assert worst(got[real], ours(ids, mask).last_hidden_state[real]) > LIMIT


# Gradients


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of every parameter, by a fixed cotangent on the rows of real tokens; the rows themselves too."""
    rows = run()
    cotangent = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3)).to(rows.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((rows * cotangent).sum(), parameters)
    return {"rows": rows.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("name", ["tiny", "all biases", "silu", "irregular"])
def test_gradients_of_all_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to transformers in float64; in float32 no worse than twice transformers' own float32.

    Both entrances, both sides of padding, gradient checkpointing, and the reference ops.
    """
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
    config = TINY if name == "tiny" else replace(CASES[name], num_hidden_layers=4)
    texts = random_ids([1, 2, 40, 17, 66], config.vocab_size)
    ids, mask = pad(texts)
    real, left = mask.bool(), pad(texts, "left")

    theirs, ours = twins(config)
    runs = {
        "packed": lambda: ours(pack(texts)),
        "padded": lambda: ours(ids, mask).last_hidden_state[real],
        "padded left": lambda: ours(*left).last_hidden_state[left[1].bool()],
    }
    their_run = lambda: theirs(ids, attention_mask=mask).last_hidden_state[real]  # noqa: E731
    plain = gradients(theirs, their_run)
    singles = {way: gradients(ours, run) for way, run in runs.items()}
    with backend("reference"):
        singles["reference"] = gradients(ours, runs["packed"])
    ours.gradient_checkpointing = True
    singles["checkpointed"] = gradients(ours, runs["packed"])
    ours.gradient_checkpointing = False
    assert all(torch.equal(singles["checkpointed"][key], singles["packed"][key]) for key in plain)

    theirs.double(), ours.double()
    truth = gradients(theirs, their_run)
    doubles = {way: gradients(ours, run) for way, run in runs.items()}
    with backend("reference"):
        doubles["reference"] = gradients(ours, runs["packed"])

    assert set(truth) == {"rows", *dict(ours.named_parameters())}
    for key, value in truth.items():
        assert value.abs().max() > 1e-3, f"{key} has no gradient to speak of"
        for way, grads in doubles.items():
            assert worst(grads[key], value) <= 1e-11 * value.abs().max(), f"{way} {key}"
        for way, grads in singles.items():
            assert_accurate(grads[key], plain[key], value, f"{way} {key}")
