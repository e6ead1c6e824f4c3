"""Train a ColBERT on the scores of a teacher: KL over n documents of each query (mxbai-edge, stage 4).

    python -m modernbert.recipes.colbert --rows FOLDER --model DISTILLED/model --output RUN
    python -m modernbert.recipes.colbert --rows MINED/rows --teacher FOLDER --teacher-model NAME --model M --output RUN

Rows have documents and scores; or, with `--teacher`, a positive and negatives, which a cross-encoder or a ColBERT
scores, each pair once. When a run was stopped, the same command goes on from its last checkpoint, to the same weights.
`OUTPUT/model` is the result.

The defaults are the published run. It leaves out the epochs, the schedule, weight decay and Muon's momentum, which have
stand-ins here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from modernbert.config import FLAG, POSITIVE, SIZE
from modernbert.heads.colbert import ColBERT, ColBERTConfig
from modernbert.late_interaction import Ragged
from modernbert.packing import Tokens
from modernbert.train import data
from modernbert.train.beir import beir
from modernbert.train.claim import claim_folder
from modernbert.train.distributed import Ranks, ranks
from modernbert.train.examples import Pair, read_scored, read_triples
from modernbert.train.groups import hidden_matrices
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.losses import kl_distill, min_max, n_way_scores
from modernbert.train.muon import MuonAdamW
from modernbert.train.options import AMOUNT, COUNT, SHARE, check_values, fixed, option, parse, run
from modernbert.train.prepare import prepare
from modernbert.train.sampling import Sampler
from modernbert.train.schedules import warmup_stable_decay
from modernbert.train.start import KEEP, hash_of, start_colbert
from modernbert.train.teacher import PATIENCE, Teacher, identity_of_scores, write_scores
from modernbert.train.teacher_folder import identity_of
from modernbert.train.validation import Validation

DIMS = {"17m": 48, "32m": 64}
"""The width of the vectors of the published models, which differ in nothing else here."""


@dataclass(frozen=True)
class Config:
    rows: str = option("file or folder of rows: documents and scores; or, with --teacher, triples", free=True)
    model: str = option("folder or hub id of the checkpoint to start from", free=True)
    output: str = option("folder of the run and its result", free=True)
    teacher: str = option("folder of a teacher's scores, see train/teacher_folder.py", "", free=True)
    teacher_model: str = option("cross-encoder or folder of a ColBERT that adds what the folder lacks", "", free=True)
    teacher_length: int = option("tokens of a pair that a cross-encoder reads", 512, kind=SIZE)
    exclude_sources: tuple[str, ...] = option("sources of rows that are left out", ())
    ways: int = option("documents of each query that are used; rows with fewer are left out", 16, kind=SIZE)

    preset: Literal["17m", "32m"] = option("row of the published width", "17m")
    dim: int | None = option("width of the vector of a token; left out: as published", None, kind=SIZE)
    head: str = option("linear, wide or residual: see HEADS in train/start.py; or keep, of a ColBERT", "residual")
    lower_case: bool = option("lower-case all texts", True, kind=FLAG)
    query_length: int = option("longest query, in tokens", 48, kind=SIZE)
    document_length: int = option("longest document of the finished model, in tokens", 512, kind=SIZE, free=True)
    train_document_length: int = option("longest document in training", 220, kind=SIZE)
    query_expansion: bool = option("fill queries with [MASK] up to their length", False, kind=FLAG)
    attend_to_expansion: bool = option("let the tokens of a query attend to these", False, kind=FLAG)

    normalize: Literal["both", "teacher", "none"] = option("scores that are stretched to 0 to 1 for each query", "both")
    temperature: float = option("temperature of the student's scores", 1.0, kind=POSITIVE)
    teacher_temperature: float = option("temperature of the teacher's scores", 1.0, kind=POSITIVE)
    optimizer: Literal["muon", "adamw"] = option("of the matrices of the layers; AdamW has everything else", "muon")
    matrix_learning_rate: float = option("highest learning rate of Muon", 1e-3, kind=POSITIVE)
    learning_rate: float = option("highest learning rate of AdamW", 8e-5, kind=POSITIVE)
    weight_decay: float = option("share of a weight that a step takes, times the learning rate", 0.0, kind=AMOUNT)
    batch_queries: int = option("queries of a step, over all ranks", 128, kind=SIZE)
    rank_queries: int = option("queries of a batch of one rank; a step accumulates batches", 16, kind=SIZE)
    epochs: int = option("passes over the rows", 1, kind=SIZE)
    steps: int | None = option("steps, in place of the epochs", None, kind=SIZE)
    warmup: float = option("share of the steps in which the learning rate rises; then it falls", 0.05, kind=SHARE)
    seed: int = option("seed of the head and of the order of the queries", 17, kind=COUNT)
    device: str = option("where to train, such as cuda", "cpu", free=True)
    autocast: bool = option("compute in bfloat16", True, kind=FLAG)
    threads: int = option("threads of a CPU", 2, kind=SIZE)
    validation: str = option("BEIR folder, whose nDCG@10 finds the best checkpoint", "", free=True)
    validate_steps: int = option("steps between two measurements of it", 250, kind=SIZE, free=True)
    save_minutes: float = option("minutes between two checkpoints", 5.0, kind=AMOUNT, free=True)


def main(config: Config) -> ColBERT:
    """Run what is left of the recipe and return the model."""
    check_values(config)
    if config.ways < 2:
        raise ValueError("--ways is 1, but a teacher compares two documents or more")
    if config.teacher_model and not config.teacher:
        raise ValueError("--teacher-model fills the folder --teacher, which is not given")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with ranks(config.device, timeout_minutes=PATIENCE if config.teacher_model else 30.0) as group:
        batches_of(config, group)  # refuses what cannot be
        made_of = group.on_first(lambda: inputs(config))
        with claim_folder(config.output, "colbert", fixed(config) | made_of, group) as output:
            model = build(config).to(group.device).train()
            prepare(model, group)
            group.on_first(lambda: ask(config, group.device))
            group.on_first(lambda: len(read(config, model, made_of, output).lengths))
            rows = read(config, model, made_of, output)
            train(config, model, rows, made_of, output, group)
            model.eval()
            model.config = replace(model.config, document_length=config.document_length)
            group.on_first(lambda: model.save_pretrained(output / "model"))
    return model


def triples(config: Config) -> Iterator[Pair]:
    """The rows of `--rows` for a teacher, with as many negatives as are used."""
    return cut(config, read_triples(config.rows, exclude_sources=config.exclude_sources, skip_empty=True))


def cut(config: Config, pairs: Iterator[Pair]) -> Iterator[Pair]:
    """The first `--ways` documents of each pair that has as many. ValueError: none has."""
    count = 0
    for pair in pairs:
        if len(pair.negatives) >= config.ways - 1:
            count += 1
            yield pair._replace(negatives=pair.negatives[: config.ways - 1], scores=pair.scores[: config.ways])
    if not count:
        raise ValueError(f"no row of {config.rows} has {config.ways} documents: give a smaller --ways")


def ask(config: Config, device: torch.device) -> None:
    """Add to the teacher's folder the scores that it lacks, if its model is given."""
    if config.teacher_model:
        pairs = (asked for pair in triples(config) for asked in asked_of(pair))
        options = {"max_length": config.teacher_length, "device": str(device)}
        write_scores(pairs, config.teacher_model, config.teacher, **options)


def asked_of(pair: Pair) -> list[tuple[str, str]]:
    """The query with each document, the positive first."""
    return [(pair.query, document) for document in (pair.positive, *pair.negatives)]


def scored(config: Config) -> Iterator[Pair]:
    """The rows with a teacher's scores: those of the rows, or those of the folder `--teacher`."""
    if not config.teacher:
        yield from cut(config, read_scored(config.rows, exclude_sources=config.exclude_sources, skip_empty=True))
        return
    teacher = Teacher(config.teacher)
    for pair in triples(config):
        yield pair._replace(scores=tuple(teacher.scores(teacher.index(asked_of(pair))).tolist()))


def inputs(config: Config) -> dict[str, object]:
    """What the run starts from. Folders may move, and that of the teacher may grow."""
    model = config.teacher_model
    known = identity_of_scores(model, config.teacher_length) if model else None
    teacher = known or (identity_of(config.teacher) if config.teacher else None)
    rows = data.digest(data.pair_files(config.rows))
    return {"hash of the inputs": rows, "hash of the model": hash_of(config.model), "teacher": teacher}


def build(config: Config) -> ColBERT:
    """The model with a new head, and with the lengths of training."""
    lengths = ColBERTConfig(
        query_length=config.query_length,
        document_length=config.train_document_length,
        do_query_expansion=config.query_expansion,
        attend_to_expansion_tokens=config.attend_to_expansion,
    )
    dim = config.dim or (None if config.head == KEEP else DIMS[config.preset])
    return start_colbert(config.model, head=config.head, dim=dim, config=lengths, lower_case=config.lower_case)


def read(config: Config, model: ColBERT, made_of: dict[str, object], output: Path) -> data.TokenizedPairs:
    """The rows as token ids, which the next start finds in `output`."""

    def make() -> data.TokenizedPairs:
        made = data.TokenizedPairs.from_pairs(scored(config), model, teacher=None)
        print(f"{len(made.lengths):,} queries with {config.ways} documents", flush=True)
        return made

    return data.kept(output / "tokens.npz", made_of, make)


def batches_of(config: Config, group: Ranks) -> int:
    """The batches of a step on each rank."""
    accumulate, rest = divmod(config.batch_queries, config.rank_queries * group.world_size)
    if rest or not accumulate:
        each = f"{config.rank_queries} queries of each of {group.world_size} ranks"
        raise ValueError(f"--batch-queries {config.batch_queries} cannot be cut into --rank-queries, {each}")
    return accumulate


def train(
    config: Config,
    model: ColBERT,
    rows: data.TokenizedPairs,
    made_of: dict[str, object],
    output: Path,
    group: Ranks,
) -> None:
    """From the last checkpoint to the last step."""
    batches = Sampler(
        rows.lengths, max_rows=config.rank_queries, seed=config.seed, rank=group.rank, world_size=group.world_size
    )
    steps = config.steps or config.epochs * -(-len(rows.lengths) // config.batch_queries)
    fit(
        model,
        optimizer(config, model),
        batches,
        partial(batch_loss, config, model, rows),
        output=output,
        settings=fixed(config) | made_of,
        steps=steps,
        schedule=partial(
            warmup_stable_decay, total=steps, warmup=config.warmup * steps, decay=(1 - config.warmup) * steps
        ),
        accumulate=batches_of(config, group),
        autocast=config.autocast,
        validation=validation(config, model),
        ranks=group,
        save_minutes=config.save_minutes,
    )


def optimizer(config: Config, model: ColBERT) -> torch.optim.Optimizer:
    """Muon on the matrices of the layers with AdamW on the rest, or AdamW alone."""
    matrices = hidden_matrices(model) if config.optimizer == "muon" else []
    chosen = set(matrices)
    others = [parameter for parameter in model.parameters() if parameter not in chosen]
    group = {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay}
    if not matrices:
        return torch.optim.AdamW([group])
    of_muon = {"params": matrices, "lr": config.matrix_learning_rate, "weight_decay": config.weight_decay}
    return MuonAdamW([of_muon, group], matrices, betas=(0.9, 0.999))


def validation(config: Config, model: ColBERT) -> Validation | None:
    """nDCG@10 on a BEIR folder, with the lengths of the finished model."""
    if not config.validation:
        return None
    scores = beir(config.validation, model)

    def measure() -> dict[str, float]:
        trained, model.config = model.config, replace(model.config, document_length=config.document_length)
        try:
            return scores()
        finally:
            model.config = trained

    return Validation(measure, config.validate_steps, best="nDCG@10", highest=True)


def batch_loss(config: Config, model: ColBERT, rows: data.TokenizedPairs, batch: np.ndarray) -> BatchLoss:
    """KL(teacher || student) over the documents of each query, and how often both have the same first."""
    queries, documents = model.query_tokens(rows.queries.select(batch)), model.document_tokens(rows.documents(batch)[0])
    scores_BN = n_way_scores(vectors(model, queries), vectors(model, documents))
    teacher_BN = torch.from_numpy(rows.teacher_scores(batch)).view(scores_BN.shape).to(scores_BN.device)
    same_B = scores_BN.argmax(1) == teacher_BN.argmax(1)
    if config.normalize != "none":
        teacher_BN = min_max(teacher_BN)
    if config.normalize == "both":
        scores_BN = min_max(scores_BN)
    temperatures = {"temperature": config.temperature, "teacher_temperature": config.teacher_temperature}
    loss = kl_distill(scores_BN, teacher_BN, **temperatures)
    size = queries.batch.num_tokens + documents.batch.num_tokens
    return BatchLoss(loss, size, {"same_first": same_B.float().mean()}, count=len(batch))


def vectors(model: ColBERT, tokens: Tokens) -> Ragged:
    """The scored rows of texts, with their graph."""
    return model(tokens.to(model.device))


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
