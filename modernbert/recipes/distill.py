"""Distil the vectors of a teacher into an Embedder (mxbai-edge, stage 3): plain L2, through a head that is thrown away.

    python -m modernbert.recipes.distill --texts FOLDER --model M --teacher FOLDER --teacher-model NAME --output RUN

Queries and passages are just texts. The teacher embeds each text once, into its folder. When a run was stopped, the
same command goes on from its last checkpoint, to the same weights. `OUTPUT/model` is the result.

The report has a teacher of 1,024 numbers (Stella 1.5B), 1.45 million queries and 4 million passages, for both sizes. It
leaves out the learning rate, the batch and the lengths: their defaults here are stand-ins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modernbert.config import FLAG, POSITIVE, SIZE
from modernbert.heads.embedder import Embedder
from modernbert.train.beir import beir
from modernbert.train.claim import claim_folder
from modernbert.train.data import digest
from modernbert.train.dense import OneVector
from modernbert.train.distributed import Ranks, ranks
from modernbert.train.examples import read_all_texts
from modernbert.train.groups import parameter_groups
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.options import AMOUNT, COUNT, SHARE, check_values, fixed, option, parse, run
from modernbert.train.passages import as_array, texts_at
from modernbert.train.prepare import prepare
from modernbert.train.ragged import RaggedIds, tokenize_texts
from modernbert.train.reading import files
from modernbert.train.sampling import Sampler
from modernbert.train.schedules import warmup_stable_decay
from modernbert.train.start import hash_of, start_embedder
from modernbert.train.teacher import PATIENCE, Teacher, identity_of_vectors, text_key, write_teacher
from modernbert.train.teacher_folder import identity_of
from modernbert.train.validation import Validation
from modernbert.train.vector_losses import DistillationHead, embedding_l2


@dataclass(frozen=True)
class Config:
    texts: tuple[str, ...] = option('files or folders of rows with a "text", or of pairs', free=True)
    model: str = option("folder or hub id of the checkpoint to start from", free=True)
    teacher: str = option("folder of the teacher's vectors, see train/teacher_folder.py", free=True)
    output: str = option("folder of the run and its result", free=True)
    teacher_model: str = option("sentence-transformers model that adds what the folder lacks", "", free=True)
    teacher_length: int = option("tokens of a text that it reads", 512, kind=SIZE)

    learning_rate: float = option("highest learning rate", 1e-4, kind=POSITIVE)
    head_learning_rate: float = option("highest learning rate of the head that is thrown away", 1e-3, kind=POSITIVE)
    weight_decay: float = option("share of a weight that a step takes, times the learning rate", 0.01, kind=AMOUNT)
    batch_texts: int = option("texts of a step, over all ranks", 1024, kind=SIZE)
    rank_texts: int = option("texts of a batch of one rank; a step accumulates batches", 128, kind=SIZE)
    max_length: int = option("tokens of a text", 512, kind=SIZE)
    epochs: int = option("passes over the texts", 1, kind=SIZE)
    steps: int | None = option("steps, in place of the epochs", None, kind=SIZE)
    warmup: float = option("share of the steps in which the learning rate rises; then it falls", 0.05, kind=SHARE)
    seed: int = option("seed of the head and of the order of the texts", 17, kind=COUNT)
    device: str = option("where to train, such as cuda", "cpu", free=True)
    autocast: bool = option("compute in bfloat16", True, kind=FLAG)
    threads: int = option("threads of a CPU", 2, kind=SIZE)
    validation: str = option("BEIR folder, whose nDCG@10 finds the best checkpoint", "", free=True)
    validate_steps: int = option("steps between two measurements of it", 250, kind=SIZE, free=True)
    save_minutes: float = option("minutes between two checkpoints", 5.0, kind=AMOUNT, free=True)


class Student(nn.Module):
    """The model with the head that brings its vectors to the width of the teacher's."""

    def __init__(self, embedder: Embedder, width: int) -> None:
        super().__init__()
        self.embedder = embedder
        self.head = DistillationHead(embedder.dim, width)


@dataclass(frozen=True)
class Lessons:
    """What is learnt from: the ids of different texts, and the row of each in the teacher's vectors."""

    ids: RaggedIds
    rows: np.ndarray
    teacher: Teacher


def main(config: Config) -> Embedder:
    """Run what is left of the recipe and return the model."""
    check_values(config)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with ranks(config.device, timeout_minutes=PATIENCE if config.teacher_model else 30.0) as group:
        batches_of(config, group)  # refuses what cannot be
        made_of = group.on_first(lambda: inputs(config))
        with claim_folder(config.output, "distill", fixed(config) | made_of, group) as output:
            embedder = start_embedder(config.model, max_length=config.max_length)
            group.on_first(lambda: ask(config, group.device))
            lessons = read(config, embedder)
            assert lessons.teacher.width is not None  # `read` has seen to it
            student = Student(embedder, lessons.teacher.width).to(group.device).train()
            prepare(student, group)
            train(config, student, lessons, made_of, output, group)
            student.eval()
            group.on_first(lambda: embedder.save_pretrained(output / "model"))
    return embedder


def texts(config: Config) -> Iterator[str]:
    return (text for source in config.texts for text in read_all_texts(source))


def ask(config: Config, device: torch.device) -> None:
    """Add to the teacher's folder what it lacks, if its model is given."""
    if config.teacher_model:
        options = {"max_length": config.teacher_length, "device": str(device)}
        write_teacher(texts(config), config.teacher_model, config.teacher, **options)


def inputs(config: Config) -> dict[str, object]:
    """What the run starts from. Folders may move, and that of the teacher may grow."""
    texts = digest(file for source in config.texts for file in files(source))
    model = config.teacher_model
    teacher = identity_of_vectors(model, config.teacher_length) if model else identity_of(config.teacher)
    return {"hash of the inputs": texts, "hash of the model": hash_of(config.model), "teacher": teacher}


def read(config: Config, embedder: Embedder) -> Lessons:
    """The different texts, with a vector of the teacher for each."""
    teacher = Teacher(config.teacher)
    if teacher.width is None:
        raise ValueError(f"{config.teacher} has scores; vectors of texts are wanted")
    keys = as_array(map(text_key, texts(config)))
    first = np.sort(np.unique(keys, return_index=True)[1])
    rows = teacher.find(keys[first])
    if missing := int((rows < 0).sum()):
        raise ValueError(
            f"{config.teacher} lacks {missing:,} of {len(rows):,} texts: give --teacher-model, which adds them"
        )
    ids = tokenize_texts(texts_at(texts(config), first), embedder.tokenizer, max_length=config.max_length)
    print(f"{len(ids):,} texts", flush=True)
    return Lessons(ids, rows, teacher)


def batches_of(config: Config, group: Ranks) -> int:
    """The batches of a step on each rank."""
    accumulate, rest = divmod(config.batch_texts, config.rank_texts * group.world_size)
    if rest or not accumulate:
        each = f"{config.rank_texts} texts of each of {group.world_size} ranks"
        raise ValueError(f"--batch-texts {config.batch_texts} cannot be cut into --rank-texts, {each}")
    return accumulate


def train(
    config: Config, student: Student, lessons: Lessons, made_of: dict[str, object], output: Path, group: Ranks
) -> None:
    """From the last checkpoint to the last step."""
    batches = Sampler(
        lessons.ids.lengths,
        max_rows=config.rank_texts,
        seed=config.seed,
        rank=group.rank,
        world_size=group.world_size,
    )
    steps = config.steps or config.epochs * -(-len(lessons.ids) // config.batch_texts)
    groups = parameter_groups(student.embedder, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    groups.append({"params": list(student.head.parameters()), "lr": config.head_learning_rate, "weight_decay": 0.0})
    fit(
        student,
        torch.optim.AdamW(groups, betas=(0.9, 0.98)),
        batches,
        partial(batch_loss, student, lessons),
        output=output,
        settings=fixed(config) | made_of,
        steps=steps,
        schedule=partial(
            warmup_stable_decay, total=steps, warmup=config.warmup * steps, decay=(1 - config.warmup) * steps
        ),
        accumulate=batches_of(config, group),
        autocast=config.autocast,
        validation=validation(config, student.embedder),
        ranks=group,
        save_minutes=config.save_minutes,
    )


def validation(config: Config, model: Embedder) -> Validation | None:
    """nDCG@10 on a BEIR folder, of the vectors without the head."""
    if not config.validation:
        return None
    return Validation(beir(config.validation, OneVector(model)), config.validate_steps, best="nDCG@10", highest=True)


def batch_loss(student: Student, lessons: Lessons, batch: np.ndarray) -> BatchLoss:
    """The mean distance over texts, and the mean cosine."""
    texts, device = lessons.ids.packed(batch), student.embedder.device
    teacher_BE = lessons.teacher[lessons.rows[batch]].to(device)
    x_BE = student.head.layers(student.embedder(texts.to(device)))
    loss = embedding_l2(x_BE, teacher_BE)
    cosine = F.cosine_similarity(x_BE.detach().float(), teacher_BE).mean()
    return BatchLoss(loss, texts.num_tokens, {"cosine": cosine}, count=len(batch))


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
