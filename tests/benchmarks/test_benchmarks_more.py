"""Training, late interaction and accuracy: every way computes what plain code says, and nobody hides an error."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pretended_models import LENGTHS
from torch import Tensor

from benchmarks.models import accuracy, colbert, late_interaction, learning, peers, texts, training
from benchmarks.models.batches import GRADIENT
from benchmarks.models.case import Case, Place, Way
from benchmarks.models.comparison import rms
from benchmarks.models.implementations import OURS, SDPA, Implementation
from benchmarks.models.measure import Bench, bench
from benchmarks.models.rows import Rates, shares
from benchmarks.seeded import save_seeded
from modernbert.config import EncoderConfig

pytest.importorskip("transformers")

TINY = EncoderConfig(
    vocab_size=50_368,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    local_attention=16,
)
RATES = Rates(1e9, 1e9)
SUITES = (training, colbert, accuracy)
BACKWARD = Case((20, 20, 20), (), backward=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("tiny")
    save_seeded(TINY, folder)
    return Place(str(folder), "float32", "cpu", True)


def only(ways) -> Way:
    (one,) = ways
    return one


def hidden_states(place: Place, model, lengths) -> list[Tensor]:
    """Every text by itself."""
    return [model(input_ids=texts.ids(at, n)[None]).last_hidden_state[0] for at, n in enumerate(lengths)]


def gradient_times_loss(model, loss: Tensor) -> Tensor:
    loss.backward()
    return dict(model.named_parameters())[GRADIENT].grad * loss.detach()


@pytest.mark.parametrize("who", ["ours", "sdpa"])
def test_a_step_of_the_encoder_has_the_gradient_of_every_text_by_itself(tiny: Place, who: str) -> None:
    expected = only(peers.alone(tiny)(BACKWARD)).answer()
    for one in learning.encoder(tiny, who)(BACKWARD):
        assert rms(one.answer(), expected) < 1e-5
    half = replace(tiny, dtype="bfloat16")
    for one in learning.encoder(half, who)(BACKWARD):
        assert 1e-4 < rms(one.answer(), expected) < 0.1  # passes in bfloat16, indeed


def test_adamw_does_its_work_and_leaves_the_weights_as_they_are(tiny: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Spy(torch.optim.AdamW):
        def __init__(self, *args, **settings) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    one = only(learning.encoder(tiny, "ours")(replace(BACKWARD, options={"optimizer": True})))
    (optimizer,) = made
    before = [weight.clone() for group in optimizer.param_groups for weight in group["params"]]
    one.run()
    one.warm()
    after = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert all(state["exp_avg"].abs().max() > 0 for state in optimizer.state.values())
    assert "AdamW" in one.settings


def test_the_loss_of_masked_tokens_is_that_of_all_logits(tiny: Place) -> None:
    """Plain: logits of all tokens, of which those without a mask are ignored."""
    model, lengths = peers.load(tiny, "sdpa"), BACKWARD.lengths
    head = learning.head_state(TINY.hidden_size, TINY.vocab_size)
    ids, targets = zip(*(learning.masked(at, n) for at, n in enumerate(lengths)), strict=True)
    assert 0 < sum((one >= 0).sum() for one in targets) < 0.6 * sum(lengths)
    assert all(one[0] >= 0 for one in targets)
    x = torch.cat([model(input_ids=one[None]).last_hidden_state[0] for one in ids])
    h = F.layer_norm(F.gelu(x @ head["dense"].T), (TINY.hidden_size,), head["norm"], None, TINY.norm_eps)
    logits = h @ model.get_input_embeddings().weight.T + head["bias"]
    loss = F.cross_entropy(logits, torch.cat(targets), ignore_index=-100)
    expected = gradient_times_loss(model, loss)
    assert 1 < loss < 100
    for who in ("ours", "sdpa"):
        assert rms(only(learning.masked_lm(tiny, who)(BACKWARD)).answer(), expected) < 1e-5


def test_the_contrastive_step_scores_every_pair_once(tiny: Place) -> None:
    """Plain: a loop over queries and documents of many lengths."""
    lengths = (9, 4, 7, 20, 3, 11)
    model = peers.load(tiny, "sdpa")
    weight = learning.projection(TINY.hidden_size, learning.WIDTH)
    vectors = [F.normalize(x @ weight.T, dim=-1) for x in hidden_states(tiny, model, lengths)]
    scores = torch.stack([torch.stack([(q @ d.T).amax(1).sum() for d in vectors[3:]]) for q in vectors[:3]])
    loss = F.cross_entropy(scores, torch.arange(3))
    expected = gradient_times_loss(model, loss)
    case = Case(lengths, (), backward=True)
    for who in ("ours", "sdpa"):
        assert rms(only(learning.contrastive(tiny, who)(case)).answer(), expected) < 1e-5


def test_a_step_is_judged_by_its_loss_and_by_its_gradient() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.data.fill_(2.0)
    holder = torch.nn.Module()
    holder.register_parameter(GRADIENT.replace(".", "_"), model.weight)
    holder.named_parameters = lambda **_: [(f"model.{GRADIENT}", model.weight)]
    one = learning.step_way("", holder, lambda: model(torch.ones(3)).square().sum())
    assert one.answer().tolist() == [[12 * 36.0] * 3]
    assert one.answer().tolist() == [[12 * 36.0] * 3]  # gradients do not add up


@pytest.mark.parametrize("width", [128, 48])
def test_vectors_are_those_of_every_text_by_itself(tiny: Place, width: int) -> None:
    case = Case(LENGTHS, (0, 1, 3))
    expected = only(late_interaction.vectors(tiny, "alone", width)(case)).answer()
    assert expected.shape == (21 + 3 + 40, width)
    torch.testing.assert_close(expected.norm(dim=-1), torch.ones(len(expected)))
    for who in ("ours", "sdpa"):
        for one in late_interaction.vectors(tiny, who, width)(case):
            torch.testing.assert_close(one.answer(), expected, atol=1e-5, rtol=0)


def test_sentence_transformers_gives_the_same_vectors_from_ids_and_from_text(tiny: Place) -> None:
    package = pytest.importorskip("sentence_transformers", minversion="6.2")
    case = Case(LENGTHS, (0, 1, 3))
    expected = only(late_interaction.vectors(tiny, "alone", 48)(case)).answer()
    for one in late_interaction.sentence_transformers(tiny, 48)(case):
        torch.testing.assert_close(one.answer(), expected, atol=1e-5, rtol=0)
    texts_case = Case((1,) * 5, (0, 4))
    ours, theirs = (only(late_interaction.from_text(tiny, who)(texts_case)).answer() for who in ("ours", "theirs"))
    assert ours.shape[1] == 128
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(package, "MultiVectorEncoder")
        with pytest.raises(RuntimeError, match="has no MultiVectorEncoder"):
            late_interaction.sentence_transformers(tiny, 48)


def test_every_way_of_maxsim_gives_the_scores_of_the_pairs(tiny: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """All products are negative, so that a padded token which is not hidden would win."""
    monkeypatch.setattr(
        late_interaction, "unit", lambda at, n, width: torch.rand(n, width) + 0.1 if at < 2 else -torch.rand(n, width)
    )
    case = Case((5, 3, 9, 1, 17, 2, 30, 4, 8, 16, 7), (), options={"queries": 2})
    answers = []
    for who in ("reference", "ours", "einsum"):
        torch.manual_seed(0)
        answers += [one.answer() for one in late_interaction.maxsim(tiny, who, 16)(case)]
    assert len(answers) == 4  # the einsum for all documents and in parts
    assert answers[0].shape == (2, 9)
    assert answers[0].max() < 0
    for one in answers[1:]:
        torch.testing.assert_close(one, answers[0], atol=1e-5, rtol=0)


def test_nobody_is_refused_for_an_error_and_who_does_not_run_has_a_reason() -> None:
    names = {
        how: Implementation("pretended_models:pretend", options={"how": how}) for how in ("right", "wrong", "fails")
    }
    with (
        bench("accuracy", quick=True, minutes=None, models={"tiny": TINY}, device="cpu") as here,
        here.team("tiny", "bfloat16", names, reference=names["right"]) as team,
    ):
        here.known_rates["bfloat16"] = RATES
        result = accuracy.drift(team, "bfloat16-512", 512)
    rows = {(row["implementation"], row["figure"]): row for row in result.rows}
    assert set(rows) == {(name, figure) for name in ("right", "wrong") for figure in ("rms error", "cosine")}
    assert rows["right", "rms error"]["median"] == accuracy.EXACT
    assert 1e-5 < rows["wrong", "rms error"]["median"] < 1e-3  # one beside ids of some thousands
    assert rows["right", "cosine"]["median"] == 1
    assert rows["right", "rms error"]["times_better_than"]["wrong"] > 1e6
    assert "unknown shape" in only(reason for name, reason in result.refused.items() if name.endswith("fails"))


def test_the_default_model_is_compared_with_its_own_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    small = accuracy.int8_retrieval.demo(passages=30)
    small = small._replace(queries=dict([*small.queries.items()][:5]))
    monkeypatch.setattr(accuracy.int8_retrieval, "demo", lambda passages: small)
    with bench("accuracy", quick=True, minutes=None, device="cpu") as here:
        here.known_rates["float32"] = RATES
        rows = {row["dtype"]: row for row in accuracy.top_ten(here).rows}
    assert set(rows) == {"float32", "bfloat16", "float16", "int8"}
    assert (rows["float32"]["median"], rows["float32"]["max_error"]) == (1, 0)
    assert all(0.7 < row["median"] <= 1 for row in rows.values())
    assert 0 < rows["float16"]["max_error"] < rows["bfloat16"]["max_error"] < rows["int8"]["max_error"] < 0.2
    assert {row["model"] for row in rows.values()} == {"default"}


def benches() -> list[Bench]:
    """A try-out on a CPU, and a full run on what is pretended to be a GPU: nothing is started in either."""
    known = dict.fromkeys(("float32", "bfloat16"), RATES)
    return [
        Bench("", quick, device, None, math.inf, Path(), known_rates=dict(known))
        for quick, device in ((True, "cpu"), (False, "cpu"), (False, "cuda"))
    ]


@pytest.mark.parametrize("here", benches(), ids=["try-out", "cpu", "gpu"])
def test_every_workload_has_a_table_and_those_who_take_part(here: Bench) -> None:
    for workload in training.WORKLOADS:
        table = training.table(here, "ettin-17m", "bfloat16", workload)
        assert table.workload == workload
        assert table.case.backward
        assert OURS in training.NAMES[workload]
        assert (sum(table.case.lengths) == training.TOKENS) == (here.is_gpu and workload != "contrastive")
    for workload in colbert.WORKLOADS:
        table = colbert.table(here, "ettin-17m", workload)
        assert table.workload == workload
        assert table.in_unit(2.0) * 2 == pytest.approx(table.in_unit(1.0))
        names, reference = colbert.names(workload)
        assert OURS in names
        assert reference.builder.startswith("benchmarks.models.late_interaction:")
    assert SDPA in colbert.names("documents-48")[0]


def test_the_goal_of_training_is_its_share_of_the_matrix_product() -> None:
    here = benches()[2]
    table = training.table(here, "modernbert-base", "bfloat16", "encoder")
    seconds = sum(table.case.lengths) / table.goal[OURS]
    found = shares(table, seconds, RATES, "bfloat16", here.config("modernbert-base"), None)
    assert found["percent_of_matmul"] == pytest.approx(45, rel=1e-3)
    assert not training.table(here, "ettin-17m", "bfloat16", "encoder").goal
    assert not training.table(benches()[0], "modernbert-base", "float32", "encoder").goal


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__.rpartition(".")[2])
def test_nothing_is_begun_after_the_minutes(suite) -> None:
    results = [*suite.run(quick=True, only=[], minutes=-1)]
    assert len(results) == 1
    assert results[0].workload == next(iter(suite.WORKLOADS))
    assert "was not reached within -1 minutes" in results[0].refused["the rest"]
    assert not results[0].rows
