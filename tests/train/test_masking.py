from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modernbert.packing import pack
from modernbert.tokenizer import Tokenizer
from modernbert.train.masking import Masking

CLS, SEP, PAD, MASK, UNK = 50281, 50282, 50283, 50284, 50280
VOCABULARY = 50368


@pytest.fixture(scope="module")
def tokenizer(modernbert_tokenizer_file):
    return Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)


def text_batch(rows=400, length=500, seed=0):
    """Ids of texts, none of which is a special token or [MASK]."""
    ids = np.random.default_rng(seed).integers(0, 50_000, (rows, length))
    ids[:, 0], ids[:, -1] = CLS, SEP
    return pack(ids.tolist())


def counts(before, after, rows_Q):
    """The shares of all tokens, and of those chosen: [MASK], another token, unchanged."""
    chosen, read = before[rows_Q], after[rows_Q]
    masked, kept = read == MASK, read == chosen
    parts = [masked.float().mean(), (~masked & ~kept).float().mean(), kept.float().mean()]
    return len(rows_Q) / len(before), [float(part) for part in parts]


@pytest.mark.parametrize("share", [0.3, 0.15, 0.05])
@pytest.mark.parametrize("way", ["as_trained", "hugging_face"])
def test_the_shares_are_those_of_the_rule(tokenizer, way, share):
    """200,000 tokens: five standard deviations of a binomial."""
    batch = text_batch()
    masked = getattr(Masking, way)(share, tokenizer)(batch, 1)
    n = batch.num_tokens if way == "as_trained" else batch.num_tokens - 800
    got, parts = counts(batch.input_ids, masked.batch.input_ids, masked.rows_Q)
    assert got * batch.num_tokens / n == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
    for part, wanted in zip(parts, (0.8, 0.1, 0.1), strict=True):
        assert part == pytest.approx(wanted, abs=5 * (wanted * (1 - wanted) / (n * share)) ** 0.5 + 1e-4)


@pytest.mark.parametrize("way", ["as_trained", "hugging_face"])
def test_labels_are_the_tokens_that_were_there(tokenizer, way):
    batch = text_batch(20)
    before = batch.input_ids.clone()
    masked = getattr(Masking, way)(0.3, tokenizer)(batch, 7)
    assert torch.equal(batch.input_ids, before)
    assert torch.equal(masked.labels_Q, before[masked.rows_Q])
    assert masked.rows_Q.dtype == masked.labels_Q.dtype == masked.batch.input_ids.dtype == torch.int64
    assert bool((masked.rows_Q.diff() > 0).all())
    others = torch.ones(batch.num_tokens, dtype=torch.bool)
    others[masked.rows_Q] = False
    assert torch.equal(masked.batch.input_ids[others], before[others])
    assert masked.batch.lengths == batch.lengths


def test_special_tokens_are_chosen_as_trained_and_not_in_hugging_faces_way(tokenizer):
    batch = text_batch()
    special = torch.isin(batch.input_ids, torch.tensor([CLS, SEP]))
    trained = Masking.as_trained(0.3, tokenizer)(batch, 0)
    share = special[trained.rows_Q].sum() / special.sum()
    assert float(share) == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 800) ** 0.5)
    other = Masking.hugging_face(0.3, tokenizer)(batch, 0)
    assert not special[other.rows_Q].any()


def test_random_tokens_are_of_the_batch_as_trained_and_of_the_vocabulary_in_hugging_faces_way(tokenizer):
    """As trained, they reach the largest id of the batch after [MASK] was put in: [MASK]."""
    batch = pack([[7] * 200_000])
    reach = {}
    for way in ("as_trained", "hugging_face"):
        read = getattr(Masking, way)(0.5, tokenizer)(batch, 0).batch.input_ids
        reach[way] = int(read.max())
    assert reach["as_trained"] == MASK
    assert MASK < reach["hugging_face"] < VOCABULARY
    read = Masking(1.0, mask_token_id=3)(pack([[7] * 200_000]), 0).batch.input_ids
    assert set(read.tolist()) == set(range(8))
    # A tenth of the tokens stay, and one in eight of those that become a random token.
    assert float((read == 7).double().mean()) == pytest.approx(0.1 + 0.1 / 8, abs=5 * (0.1 / 200_000) ** 0.5)


def test_it_is_a_function_of_the_seed(tokenizer):
    masking, batch = Masking.as_trained(0.3, tokenizer), text_batch(4)
    one, same, other = (masking(batch, seed) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(one.batch.input_ids, same.batch.input_ids)
    assert torch.equal(one.rows_Q, same.rows_Q)
    assert not torch.equal(one.batch.input_ids, other.batch.input_ids)


def test_a_mean_over_the_chosen_tokens_always_exists(tokenizer):
    masking = Masking.hugging_face(0.05, tokenizer)
    for seed in range(50):
        masked = masking(pack([[CLS, 5, SEP]]), seed)
        assert masked.rows_Q.tolist() == [1]
    assert masking(pack([[CLS, SEP]]), 0).rows_Q.tolist() == []
    assert masking(pack([[]]), 0).rows_Q.tolist() == []


def test_the_rule_is_that_of_transformers(tokenizer, modernbert_tokenizer_file):
    """The shares of `DataCollatorForLanguageModeling` on the same ids, by kind of token, within five deviations."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    peer = AutoTokenizer.from_pretrained(str(modernbert_tokenizer_file.parent))
    ids = text_batch().input_ids.view(400, 500)
    ids[:, 5], ids[:, 6], ids[:, 7] = UNK, PAD, MASK
    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(peer, mlm_probability=0.3)
    inputs, labels = collator.torch_mask_tokens(ids.clone())
    masked = Masking.hugging_face(0.3, tokenizer)(pack(ids.tolist()), 0)
    theirs = (labels.flatten() != -100).nonzero().squeeze(1)
    special = torch.isin(ids.flatten(), torch.tensor([CLS, SEP, PAD, MASK, UNK]))
    assert not special[theirs].any()
    assert not special[masked.rows_Q].any()
    n = int((~special).sum())
    assert len(masked.rows_Q) / n == pytest.approx(len(theirs) / n, abs=7 * (0.3 * 0.7 / n) ** 0.5)
    mine = counts(ids.flatten(), masked.batch.input_ids, masked.rows_Q)[1]
    peers = counts(ids.flatten(), inputs.flatten(), theirs)[1]
    for a, b in zip(mine, peers, strict=True):
        assert a == pytest.approx(b, abs=7 * (0.16 / (0.3 * n)) ** 0.5)
    random = [
        x[r][(x[r] != MASK) & (x[r] != ids.flatten()[r])]
        for x, r in ((inputs.flatten(), theirs), (masked.batch.input_ids, masked.rows_Q))
    ]
    # A uniform distribution over the vocabulary: the mean, and the largest.
    for found in random:
        assert float(found.double().mean()) == pytest.approx(VOCABULARY / 2, rel=0.05)
        assert VOCABULARY - 100 < int(found.max()) < VOCABULARY


def test_a_rule_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="share is 0"):
        Masking(0, 4)
    with pytest.raises(ValueError, match="share is 30"):
        Masking(30, 4)
    with pytest.raises(ValueError, match="no mask token"):
        Masking.as_trained(0.3, SimpleNamespace(mask_token_id=None))


def test_it_moves_as_one(tokenizer):
    masked = Masking.as_trained(0.3, tokenizer)(text_batch(2), 0)
    moved = masked.to("meta")
    assert {moved.batch.input_ids.device.type, moved.rows_Q.device.type, moved.labels_Q.device.type} == {"meta"}
    assert masked.to(None) is masked


def test_random_tokens_as_trained_are_of_all_ids_up_to_mask(tokenizer):
    """10,000 of them, of 50,285 ids: the largest below [MASK] is missed by a few."""
    batch = pack([[7] * 200_000])
    read = Masking.as_trained(0.5, tokenizer)(batch, 0).batch.input_ids
    drawn = read[(read != MASK) & (read != 7)]
    assert int(drawn.max()) > MASK - 100
    assert int(drawn.min()) < 100
