import json
import pickle
from itertools import count, islice

import numpy as np
import pytest
import torch

from modernbert.train.bins import BinSampler, best_fit
from modernbert.train.loader import MaskedBatches, prefetch
from modernbert.train.masking import Masking
from modernbert.train.sampling import Sampler
from modernbert.train.shards import write_shards
from modernbert.train.vocabulary import train_tokenizer

TEXTS = [" ".join(f"word{(i * 7 + start) % 60}" for i in range(1 + start * 11 % 80)) for start in range(150)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), vocab_size=350)


@pytest.fixture(scope="module")
def pieces(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return write_shards(folder / "a.jsonl", tokenizer, folder / "shards", characters=3000).pieces(64)


def batches(pieces, tokenizer, rank=0, world_size=1, rows=4, **options):
    sampler = BinSampler(best_fit(pieces.lengths, 64), rows, 0, rank, world_size)
    return MaskedBatches(pieces, sampler, Masking.as_trained(0.3, tokenizer), **options)


def numbers(masked):
    return [masked.batch.input_ids.tolist(), masked.rows_Q.tolist(), masked.labels_Q.tolist(), masked.batch.lengths]


def take(loader, n, first=0):
    return [numbers(masked) for masked in islice(loader(first), n)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_at_the_exact_batch(pieces, tokenizer, workers):
    whole = take(batches(pieces, tokenizer), 60)
    loader = batches(pieces, tokenizer, workers=workers)
    for first in (0, 1, 37):
        assert take(loader, 10, first) == whole[first : first + 10]


def test_two_ranks_have_the_batches_of_one_that_accumulates(pieces, tokenizer):
    one = take(batches(pieces, tokenizer), 80)
    ranks = [take(batches(pieces, tokenizer, rank, 2), 40) for rank in range(2)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == one


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_resumes_with_its_own_batches_and_masks(pieces, tokenizer, rank):
    loader = batches(pieces, tokenizer, rank, 2)
    whole = take(loader, 12)
    for first in (1, 4, 9):
        assert take(loader, 3, first) == whole[first : first + 3]


def test_batches_of_whole_pieces_are_not_packed(pieces, tokenizer):
    """As Ettin was trained."""
    loader = MaskedBatches(pieces, Sampler(pieces.lengths, max_rows=8), Masking.as_trained(0.3, tokenizer))
    got = take(loader, 5)
    assert all(len(lengths) == 8 for *_, lengths in got)
    assert take(loader, 3, 2) == got[2:]


def test_masks_differ_between_batches_epochs_and_seeds(pieces, tokenizer):
    single = MaskedBatches(pieces, Sampler(pieces.lengths, max_rows=10**6), Masking.as_trained(0.3, tokenizer))
    first, second = islice(single(), 2)
    other = next(MaskedBatches(pieces, single.sampler, single.masking, seed=1)())
    hidden = [np.isin(np.arange(m.batch.num_tokens), m.rows_Q.numpy()) for m in (first, second, other)]
    for a, b in ((0, 1), (0, 2)):
        # Two independent draws of 30 % share 9 %.
        assert (hidden[a] & hidden[b]).mean() == pytest.approx(0.09, abs=0.02)


def test_masks_are_not_drawn_from_the_numbers_that_shuffle(pieces, tokenizer):
    """A sampler draws from the seed and the number of an epoch; a mask from these alone would be made of its order."""
    loader, rows = batches(pieces, tokenizer, seed=5), np.arange(20)
    for number in (0, 3):
        shuffled = loader.masking(pieces.packed(rows), (5, number))
        assert not torch.equal(loader.make((number, rows)).rows_Q, shuffled.rows_Q)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_keep_the_order_and_leave_the_random_state(workers):
    before = torch.get_rng_state()
    got = list(prefetch(range(20), _square, workers=workers))
    assert got == [i * i for i in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    endless = prefetch(count(5), _square, workers=workers)
    assert list(islice(endless, 3)) == [25, 36, 49]


def _square(key):
    return key * key


def _fails(key):
    raise ValueError(f"row {key} is bad")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_worker_reaches_the_caller(workers):
    with pytest.raises(ValueError, match="row 3 is bad"):
        next(prefetch([3], _fails, workers=workers))


def test_another_process_maps_the_shards_again(pieces):
    """What is sent to a worker has the lengths of the pieces, not the tokens."""
    sent = pickle.dumps(pieces)
    again = pickle.loads(sent)
    everything = np.arange(len(pieces))
    assert torch.equal(again.packed(everything).input_ids, pieces.packed(everything).input_ids)
    assert len(pickle.dumps(pieces.shards)) < 1500
