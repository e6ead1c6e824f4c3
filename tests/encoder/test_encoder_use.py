"""What one does with an encoder: odd batches, wrong arguments, query-only rows, copies, threads, resizing."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from hf_twin import TINY, pad, random_ids, twins

from modernbert import Encoder, EncoderConfig, Packed, pack
from modernbert.encoder import EncoderOutput

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return twins(TINY)[1]


# Odd batches


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0)])
def test_an_empty_batch(encoder: Encoder, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    assert encoder(ids, torch.ones_like(ids)).last_hidden_state.shape == (*shape, 64)
    batch = pack([[]] * shape[0])
    x_TD = encoder(batch)
    assert x_TD.shape == (0, 64)
    x_TD.sum().backward()  # a rank without data still takes part in a training step
    assert encoder.final_norm.weight.grad is not None
    encoder.zero_grad()


def test_sequences_of_no_token(encoder: Encoder) -> None:
    """They give no row, and the others are as without them; of any length."""
    texts = random_ids([700, 3, 800, 900], 100)
    with torch.inference_mode():
        wanted = encoder(pack(texts))
        got = encoder(pack([[], texts[0], [], [], *texts[1:], []]))
        ids, mask = pad([[], *texts])
        padded = encoder(ids, mask).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(padded[mask.bool()], wanted, rtol=0, atol=2e-5)
    assert padded[0].eq(0).all()


def test_a_text_beyond_the_maximum_warns_once() -> None:
    encoder = Encoder(replace(TINY, max_position_embeddings=50)).eval()
    ids, mask = pad(random_ids([50], 100), extra=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(pack(random_ids([50, 50], 100)))
        encoder(ids, mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for length in (51, 60):
            encoder(pack(random_ids([3, length], 100)))
    assert len(caught) == 1, "the filter that Python starts with shows a text once for a place"
    assert "a sequence is longer than max_position_embeddings, 50 tokens" in str(caught[0].message)


def test_padding_is_never_read(encoder: Encoder) -> None:
    """Ids beyond the vocabulary and NaN embeddings in padding reach neither the rows nor the gradients."""
    ids, mask = pad(random_ids([3, 40, 17], 100), "left")
    real = mask.bool()
    table = encoder.embeddings.tok_embeddings.weight
    wild = ids.masked_fill(~real, 10**9)
    with torch.no_grad():
        wanted = encoder(ids, mask).last_hidden_state
        assert torch.equal(encoder(wild, mask).last_hidden_state, wanted)
    embeds = table.detach()[ids].masked_fill(~real[..., None], torch.nan).requires_grad_()
    got = encoder(None, mask, inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad(got.square().sum(), embeds)
    assert gradient[~real].eq(0).all()
    assert gradient[real].isfinite().all()


# Arguments


def test_arguments_that_contradict(encoder: Encoder) -> None:
    embeds = torch.zeros(2, 4, 64)
    for arguments in ({}, {"input_ids": IDS, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            encoder(**arguments)
    with pytest.raises(ValueError, match="a Packed carries its own mask"):
        encoder(pack(IDS), torch.ones_like(IDS))
    for batch in (IDS, pack(IDS)):
        with pytest.raises(ValueError, match="input_ids is another name of batch"):
            encoder(batch, input_ids=IDS)


def test_the_names_of_a_padded_caller(encoder: Encoder) -> None:
    wanted = encoder(IDS).last_hidden_state
    mask = torch.ones_like(IDS)
    for output in (encoder(IDS, mask), encoder(input_ids=IDS, attention_mask=mask), encoder(batch=IDS)):
        assert isinstance(output, EncoderOutput)
        assert torch.equal(output[0], wanted)


def test_ids_beyond_the_vocabulary_are_named(encoder: Encoder) -> None:
    for wrong in (100, -1, 2**40):
        ids = IDS.clone()
        ids[1, 2] = wrong
        with pytest.raises(ValueError, match=f"token id {wrong} is out of range"):
            encoder(ids)


def test_a_mask_with_holes_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has holes.*drop the masked tokens"):
        encoder(IDS, torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]))


# Copies, threads


def test_copies_are_equal_and_apart(encoder: Encoder) -> None:
    batch = pack([[5, 6, 7], [8] * 30])
    wanted = encoder(batch)
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(twin(batch), wanted)
        assert twin.config == encoder.config
        with torch.no_grad():
            twin.final_norm.weight += 1
    assert torch.equal(encoder(batch), wanted)


def test_threads_in_inference(encoder: Encoder) -> None:
    """Eight threads, other lengths in each, and one that trains beside them: all as if they were alone."""
    batches = [pack(random_ids([30 + i, 3, 90 - i], 100, seed=i)) for i in range(8)]
    long = pack(random_ids([900, 800, 700], 100))
    with torch.inference_mode():
        wanted = [encoder(batch).clone() for batch in [*batches, long]]
    twin = copy.deepcopy(encoder)
    twin(batches[0]).square().sum().backward()
    failures: list[str] = []

    def infer(i: int, batch: Packed) -> None:
        with torch.inference_mode():
            for _ in range(3):
                if not torch.equal(encoder(batch), wanted[i]):
                    failures.append(f"thread {i}")

    def train() -> None:
        other = copy.deepcopy(encoder)
        other(batches[0]).square().sum().backward()
        for (name, mine), yours in zip(other.named_parameters(), twin.parameters(), strict=True):
            if mine.grad is None or not torch.equal(mine.grad, yours.grad):
                failures.append(f"gradient of {name}")

    threads = [threading.Thread(target=infer, args=(i, batch)) for i, batch in enumerate([*batches, long])]
    threads.append(threading.Thread(target=train))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_inference_and_training_take_turns(encoder: Encoder) -> None:
    """A mask that inference cached could not be saved for the backward pass."""
    batch = pack(random_ids([33, 44, 20], 100))
    with torch.inference_mode():
        wanted = encoder(batch).clone()
    rows = encoder(batch)
    rows.sum().backward()
    torch.testing.assert_close(rows, wanted, rtol=0, atol=2e-5)
    encoder.zero_grad()


# Resizing


def test_resize_token_embeddings() -> None:
    config = replace(TINY, vocab_size=90, pad_token_id=3)
    encoder = Encoder(config)
    encoder.embeddings.tok_embeddings.weight.requires_grad_(False)
    before = encoder.embeddings.tok_embeddings.weight.clone()
    wanted = encoder(pack([[5, 6, 89]]))
    encoder.resize_token_embeddings(5000)
    after = encoder.embeddings.tok_embeddings.weight
    assert encoder.config == replace(config, vocab_size=5000)
    assert torch.equal(after[:90], before)
    assert not after.requires_grad
    assert abs(after[90:].std() / config.initializer_range - 0.88) < 0.02  # of a normal cut at two deviations
    assert after[90:].abs().max() <= 2 * config.initializer_range
    assert torch.equal(encoder(pack([[5, 6, 89]])), wanted)
    assert encoder(torch.tensor([[4999]])).last_hidden_state.isfinite().all()
    encoder.bfloat16().resize_token_embeddings(50)
    assert encoder.embeddings.tok_embeddings.weight.shape == (50, 64)
    assert encoder.embeddings.tok_embeddings.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="token id 50 is out of range"):
        encoder(torch.tensor([[50]]))
    with pytest.raises(ValueError, match="pad_token_id"):
        encoder.resize_token_embeddings(3)
    assert encoder.embeddings.tok_embeddings.weight.shape == (50, 64), "a refused call changed the encoder"
    assert encoder.config.vocab_size == 50


# Making one


def test_from_config_and_presets() -> None:
    assert Encoder.from_config(TINY).config == TINY
    with torch.device("meta"):
        assert Encoder.from_config("ettin-1b").config == EncoderConfig.preset("ettin-1b")
    with pytest.raises(ValueError, match="ettin-17m"):
        Encoder.from_config("ettin-17")
