"""Train an Embedder on pairs: contrastive pretraining, then fine-tuning with mined negatives (mxbai-edge, stages 1, 2).

    python -m modernbert.recipes.embed --pairs FOLDER --model ENCODER --output RUN
    python -m modernbert.recipes.embed --stage finetune --pairs MINED/rows --model RUN/model --output TUNED

A row of `PUBLISHED` has the settings of a stage and a size, where options are left out. A batch of any size fits in
memory (GradCache), and under torchrun the documents of all ranks are negatives. When a run was stopped, the same
command goes on from its last checkpoint, to the same weights. `OUTPUT/model` is the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modernbert.config import FLAG, POSITIVE, SIZE
from modernbert.heads.embedder import Embedder
from modernbert.packing import Packed, pack
from modernbert.train import data
from modernbert.train.beir import beir
from modernbert.train.claim import claim_folder
from modernbert.train.dense import DenseTexts, OneVector
from modernbert.train.distributed import Ranks, gather_rows, ranks
from modernbert.train.examples import Pair, read_pairs, read_triples
from modernbert.train.grad_cache import grad_cache, token_chunks
from modernbert.train.groups import parameter_groups
from modernbert.train.in_batch import in_batch_info_nce
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.losses import cosent
from modernbert.train.options import AMOUNT, COUNT, SHARE, check_values, fixed, option, parse, run
from modernbert.train.prepare import prepare
from modernbert.train.sampling import Sampler
from modernbert.train.schedules import cosine, warmup_stable_decay
from modernbert.train.start import hash_of, start_embedder
from modernbert.train.validation import Validation
from modernbert.train.vector_losses import angle_similarity


class Published(NamedTuple):
    """Learning rates and batch sizes of pretraining are those of the report; what it leaves out has stand-ins."""

    learning_rate: float
    batch_pairs: int
    negatives: int
    angle_weight: float
    max_length: int


PUBLISHED = {
    # Report: the first two numbers (its study of both). ModernBERT-embed: the length.
    ("pretrain", "17m"): Published(6e-4, 24_576, 0, 0.0, 128),
    ("pretrain", "32m"): Published(5e-4, 12_288, 0, 0.0, 128),
    # Report: the AnglE loss. ModernBERT-embed: learning rate, batch, negatives and length.
    ("finetune", "17m"): Published(2e-5, 256, 7, 1.0, 512),
    ("finetune", "32m"): Published(2e-5, 256, 7, 1.0, 512),
}


@dataclass(frozen=True)
class Config:
    pairs: str = option("file or folder of rows: query and positive, and negatives to fine-tune with", free=True)
    model: str = option("folder or hub id of the checkpoint to start from", free=True)
    output: str = option("folder of the run and its result", free=True)
    stage: Literal["pretrain", "finetune"] = option("row of the published settings", "pretrain")
    preset: Literal["17m", "32m"] = option("its size", "17m")
    exclude_sources: tuple[str, ...] = option("sources of pairs that are left out", ())
    decontaminate_against: tuple[str, ...] = option("BEIR folders; pairs sharing 8 words in a row are left out", ())

    learning_rate: float | None = option("highest learning rate; left out: as published", None, kind=POSITIVE)
    batch_pairs: int | None = option("pairs of a step, over all ranks; left out: as published", None, kind=SIZE)
    negatives: int | None = option("mined negatives of each pair; left out: as published", None, kind=COUNT)
    angle_weight: float | None = option(
        "weight of AnglE over positives and mined negatives; left out: as published", None, kind=AMOUNT
    )
    max_length: int | None = option("tokens of a text; left out: as published", None, kind=SIZE)
    temperature: float = option("temperature of the cosines", 0.02, kind=POSITIVE)
    epochs: int = option("passes over the pairs", 1, kind=SIZE)
    steps: int | None = option("steps, in place of the epochs", None, kind=SIZE)
    warmup: float = option("share of the steps in which the learning rate rises; a cosine follows", 0.05, kind=SHARE)
    weight_decay: float = option("share of a weight that a step takes, times the learning rate", 0.01, kind=AMOUNT)
    chunk_tokens: int = option("tokens encoded at a time", 65_536, kind=SIZE)
    seed: int = option("seed of the order of the pairs", 17, kind=COUNT)
    device: str = option("where to train, such as cuda", "cpu", free=True)
    autocast: bool = option("compute in bfloat16", True, kind=FLAG)
    threads: int = option("threads of a CPU", 2, kind=SIZE)
    validation: str = option("BEIR folder, whose nDCG@10 finds the best checkpoint", "", free=True)
    validate_steps: int = option("steps between two measurements of it", 250, kind=SIZE, free=True)
    save_minutes: float = option("minutes between two checkpoints", 5.0, kind=AMOUNT, free=True)


def main(config: Config) -> Embedder:
    """Run what is left of the recipe and return the model."""
    check_values(config)
    point = point_of(config)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with ranks(config.device) as group:
        if point.batch_pairs % group.world_size:
            raise ValueError(f"--batch-pairs {point.batch_pairs} cannot be cut into {group.world_size} ranks")
        made_of = group.on_first(lambda: inputs(config))
        with claim_folder(config.output, "embed", fixed(config) | made_of, group) as output:
            model = start_embedder(config.model, max_length=point.max_length).to(group.device).train()
            prepare(model, group)
            group.on_first(lambda: len(read(config, point, model, made_of, output).lengths))
            pairs = read(config, point, model, made_of, output)
            train(config, point, model, pairs, made_of, output, group)
            model.eval()
            group.on_first(lambda: model.save_pretrained(output / "model"))
    return model


def point_of(config: Config) -> Published:
    """The published settings of the stage, with what the options say in their place."""
    point = PUBLISHED[config.stage, config.preset]
    asked = {name: getattr(config, name) for name in point._fields}
    return point._replace(**{name: value for name, value in asked.items() if value is not None})


def inputs(config: Config) -> dict[str, object]:
    """A hash of what the run starts from. Folders may move."""
    corpora = map(data.corpus_file, config.decontaminate_against)
    pairs = data.digest([*data.pair_files(config.pairs), *corpora])
    return {"hash of the inputs": pairs, "hash of the model": hash_of(config.model)}


def read(
    config: Config, point: Published, model: Embedder, made_of: dict[str, object], output: Path
) -> data.TokenizedPairs:
    """The pairs as token ids, which the next start finds in `output`."""

    def chosen(folder: str, *, exclude_sources: tuple[str, ...], skip_empty: bool) -> Iterator[Pair]:
        read = read_triples if point.negatives else read_pairs
        return data.at_most(read(folder, exclude_sources=exclude_sources, skip_empty=skip_empty), point.negatives)

    def make() -> data.TokenizedPairs:
        choice = {"exclude_sources": config.exclude_sources, "decontaminate_against": config.decontaminate_against}
        return data.TokenizedPairs.from_pairs(
            data.choose_pairs(config.pairs, **choice, read=chosen), DenseTexts(model), teacher=None
        )

    return data.kept(output / "tokens.npz", made_of, make)


def train(
    config: Config,
    point: Published,
    model: Embedder,
    pairs: data.TokenizedPairs,
    made_of: dict[str, object],
    output: Path,
    group: Ranks,
) -> None:
    """From the last checkpoint to the last step. A batch is of one source."""
    batches = Sampler(
        pairs.lengths,
        max_rows=point.batch_pairs // group.world_size,
        sources=pairs.sources,
        seed=config.seed,
        rank=group.rank,
        world_size=group.world_size,
    )
    epoch = sum(len(batch) >= group.world_size for batch in batches.plan(1))
    steps = config.steps or config.epochs * epoch
    groups = parameter_groups(model, learning_rate=point.learning_rate, weight_decay=config.weight_decay)
    fit(
        model,
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
        batches,
        partial(batch_loss, config, point, model, pairs, group),
        output=output,
        settings=fixed(config) | made_of,
        steps=steps,
        schedule=partial(
            warmup_stable_decay,
            total=steps,
            warmup=config.warmup * steps,
            decay=(1 - config.warmup) * steps,
            shape=cosine,
        ),
        autocast=config.autocast,
        validation=validation(config, model),
        ranks=group,
        save_minutes=config.save_minutes,
    )


def validation(config: Config, model: Embedder) -> Validation | None:
    """nDCG@10 on a BEIR folder."""
    if not config.validation:
        return None
    return Validation(beir(config.validation, OneVector(model)), config.validate_steps, best="nDCG@10", highest=True)


def batch_loss(
    config: Config, point: Published, model: Embedder, pairs: data.TokenizedPairs, group: Ranks, batch: np.ndarray
) -> BatchLoss:
    """InfoNCE over the documents of all ranks, and AnglE over each query of all ranks with its own documents."""
    documents, offsets = pairs.documents(batch)
    # The positives first, as the loss wants them, then all negatives.
    is_first = np.isin(np.arange(len(documents)), offsets[:-1])
    order = np.argsort(~is_first, kind="stable").tolist()
    query_N = torch.from_numpy(np.repeat(np.arange(len(batch)), np.diff(offsets))[order])
    groups_N = torch.from_numpy(pairs.groups(batch))
    texts = pack(pairs.queries.select(batch)), pack([documents[place] for place in order])

    def score(x_BE: Tensor, y_NE: Tensor) -> Tensor:
        gather = None if group.is_alone else partial(gather_rows, ranks=group)
        options = {"temperature": config.temperature, "gather": gather, "rank": group.rank}
        loss = in_batch_info_nce(x_BE, y_NE, groups_N.to(x_BE.device), **options)
        if point.angle_weight:
            similarity_N = angle_similarity(x_BE[query_N.to(x_BE.device)].float(), y_NE.float())
            labels_N = (torch.arange(len(query_N), device=similarity_N.device) < len(batch)).float()
            # Each similarity is compared with those of the whole batch, so that ranks do not change the loss.
            of_all = [gather_rows(each, group) for each in (similarity_N, labels_N)]
            loss = loss + point.angle_weight * cosent(*of_all)
        return loss

    def encode(chunk: Packed) -> Tensor:
        return model(chunk.to(model.device))

    loss = grad_cache(encode, [token_chunks(each, config.chunk_tokens) for each in texts], score)
    return BatchLoss(loss, sum(each.num_tokens for each in texts), {}, count=len(batch))


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
