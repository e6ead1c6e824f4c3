"""Fine-tune a checkpoint on labelled texts, pairs of texts or words: tasks of GLUE, or your own files.

    python -m modernbert.recipes.finetune --task RTE --train FILE --dev FILE --model FOLDER --output FOLDER

The settings of a task of GLUE are those of ModernBERT-base (arXiv 2412.13663, table 6); options that are 0 take them.
`--grid` runs the whole grid of the paper and keeps the best point. A stopped run goes on when the same command is started
again. `OUTPUT/model` is the best model on the dev file, `OUTPUT/scores.json` its scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from modernbert.checkpoint import locate
from modernbert.config import FLAG, SIZE
from modernbert.encoder import Encoder
from modernbert.files import replacing
from modernbert.heads.classifier import SequenceClassifier
from modernbert.heads.folders import class_of
from modernbert.heads.masked_lm import MaskedLM
from modernbert.heads.token_classifier import TokenClassifier
from modernbert.heads.token_labels import labels_of_words, scores_of_words
from modernbert.packing import Packed, pack
from modernbert.tokenizer import TextWindow, Tokenizer
from modernbert.train import glue, metrics
from modernbert.train.checkpoints import BEST, load_weights
from modernbert.train.claim import claim_folder
from modernbert.train.distributed import Ranks, ranks
from modernbert.train.examples import read_conll, read_labelled
from modernbert.train.loop import BatchLoss, fit
from modernbert.train.options import AMOUNT, COUNT, SHARE, check_values, fixed, option, parse, run
from modernbert.train.prepare import prepare
from modernbert.train.ragged import RaggedIds, tokenize_texts
from modernbert.train.reading import digest
from modernbert.train.sampling import Sampler
from modernbert.train.schedules import warmup_stable_decay
from modernbert.train.validation import Validation

Classifier = SequenceClassifier | TokenClassifier


HEADS = {"MaskedLM": MaskedLM, "SequenceClassifier": SequenceClassifier, "TokenClassifier": TokenClassifier}


class Published(NamedTuple):
    """The chosen point of the paper's grid, the batch size of its code, and the metrics of GLUE."""

    learning_rate: float
    weight_decay: float
    epochs: int
    batch_size: int
    metrics: tuple[str, ...]


WORDS, TEXTS = "words", "texts"
TASKS = {
    "CoLA": Published(8e-5, 1e-6, 5, 32, ("matthews",)),
    "MRPC": Published(5e-5, 5e-6, 10, 32, ("accuracy", "f1")),
    "RTE": Published(5e-5, 1e-5, 3, 16, ("accuracy",)),
    "SST-2": Published(8e-5, 1e-5, 2, 16, ("accuracy",)),
    "STS-B": Published(8e-5, 5e-6, 10, 32, ("pearson", "spearman")),
    # Not in the paper:
    TEXTS: Published(5e-5, 5e-6, 3, 32, ("accuracy",)),
    WORDS: Published(5e-5, 5e-6, 10, 32, ("entity_f1",)),
}
GRID = {"learning_rate": (1e-5, 3e-5, 5e-5, 8e-5), "weight_decay": (1e-6, 5e-6, 8e-6, 1e-5)}
EPOCHS = {"SST-2": (1, 2, 3), "RTE": (1, 2, 3)}  # of all other tasks: 2, 5 and 10
EVALUATED = 16_384  # tokens of a batch for the dev file


@dataclass(frozen=True)
class Config:
    task: str = option(f"one of {', '.join(TASKS)}; the last two are your own JSON lines and CoNLL")
    train: str = option("file to learn from: GLUE's train.tsv, rows of text, text_pair and label, or CoNLL", free=True)
    dev: str = option("file of the same kind, whose score finds the best checkpoint", free=True)
    model: str = option("folder or hub id of the checkpoint to start from", free=True)
    output: str = option("folder of the run and its result", free=True)
    labels: tuple[str, ...] = option("names of the classes of texts; none: labels are numbers", ())
    grid: bool = option("run the grid of the paper: 4 learning rates, 4 weight decays, 3 numbers of epochs", False, kind=FLAG)

    learning_rate: float = option("highest learning rate; 0: as published", 0.0, kind=AMOUNT)
    weight_decay: float = option("share of a weight that a step at the highest rate takes; 0: as published", 0.0, kind=AMOUNT)
    epochs: int = option("passes over the training file; 0: as published", 0, kind=COUNT)
    batch_size: int = option("texts of a step, over all ranks; 0: as published", 0, kind=COUNT)
    warmup: float = option("share of the steps in which the learning rate rises", 0.06, kind=SHARE)
    max_length: int = option("longest text or window, in tokens", 256, kind=SIZE)
    seed: int = option("seed of the new head and of the order of the texts", 17, kind=COUNT)
    device: str = option("where to train, such as cuda", "cpu", free=True)
    autocast: bool = option("compute in bfloat16", True, kind=FLAG)
    threads: int = option("threads of a CPU", 2, kind=SIZE, free=True)
    save_minutes: float = option("minutes between two checkpoints", 5.0, kind=AMOUNT, free=True)


def main(config: Config) -> dict[str, float]:
    """Run what is left of the recipe and return the scores of the best model on the dev file."""
    check_values(config)
    if config.task not in TASKS:
        raise ValueError(f"--task is {config.task!r:.80}, but must be one of {', '.join(TASKS)}")
    torch.set_num_threads(config.threads)
    with ranks(config.device) as group:
        if not config.grid:
            return train(with_published(config), group)
        group.on_first(lambda: claim_folder(config.output, "finetune", fixed(config)))
        found = {point: train(point, group) for point in points(config)}
        best = max(found, key=lambda point: found[point]["score"])
        group.on_first(lambda: write_scores(Path(config.output), {**found[best], "best": Path(best.output).name}))
        return found[best]


def with_published(config: Config) -> Config:
    """The config with the published values in place of each 0."""
    found = TASKS[config.task]._asdict()
    return replace(config, **{name: found[name] for name in found.keys() & vars(config).keys() if not getattr(config, name)})


def points(config: Config) -> list[Config]:
    """The runs of the grid, each in a folder of its own."""
    grid = {**GRID, "epochs": EPOCHS.get(config.task, (2, 5, 10))}
    changes = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    outputs = [str(Path(config.output, "-".join(f"{value:g}" for value in change.values()))) for change in changes]
    return [
        with_published(replace(config, grid=False, output=output, **change))
        for output, change in zip(outputs, changes, strict=True)
    ]


def train(config: Config, group: Ranks) -> dict[str, float]:
    """Fine-tune with these settings; return the scores of the best epoch."""
    tokenizer = Tokenizer.from_pretrained(config.model)
    learnt = read(config, config.train, tokenizer)
    dev = read(config, config.dev, tokenizer, labels=learnt.labels)
    settings = fixed(config) | {"hash of train and model": inputs(config), "labels": learnt.labels}
    output = group.on_first(lambda: claim_folder(config.output, "finetune", settings))
    model = build(config, learnt).to(group.device)
    prepare(model, group)
    steps_of_epoch = max(1, len(learnt.lengths) // config.batch_size + (len(learnt.lengths) % config.batch_size >= group.world_size))
    steps = config.epochs * steps_of_epoch
    shares = {"rank": group.rank, "world_size": group.world_size}
    rows, rest = divmod(config.batch_size, group.world_size)
    if rest:
        raise ValueError(f"--batch-size {config.batch_size} cannot be cut into {group.world_size} ranks")
    fit(
        model,
        # The paper's decay is decoupled from the learning rate: the rate at its highest gives back its number.
        torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=config.weight_decay / config.learning_rate,
        ),
        Sampler(learnt.lengths, max_rows=rows, seed=config.seed, **shares),
        partial(batch_loss, model, learnt),
        output=output,
        settings=settings,
        steps=steps,
        schedule=partial(
            warmup_stable_decay, total=steps, warmup=config.warmup * steps, decay=(1 - config.warmup) * steps
        ),
        autocast=config.autocast,
        validation=Validation(partial(evaluate, model, dev), steps_of_epoch, best="score", highest=True),
        ranks=group,
        save_minutes=config.save_minutes,
    )
    load_weights(output / BEST, model)
    model.eval()
    with torch.no_grad():
        scores = evaluate(model, dev)
    group.on_first(lambda: save(model, tokenizer, output, scores))
    return scores


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts or pairs of texts with one label each: a class, or a number where there are no names of classes."""

    ids: RaggedIds
    values: np.ndarray
    labels: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        return self.ids.lengths

    def batch(self, rows: np.ndarray) -> tuple[Packed, None, Tensor]:
        """The texts, None for the rows of their tokens, and their labels."""
        return self.ids.packed(rows), None, torch.from_numpy(self.values[rows])

    def scores(self, logits: Sequence[Tensor]) -> dict[str, float]:
        x_NC = torch.stack(list(logits)).numpy()
        predicted = x_NC.argmax(1) if self.labels else x_NC[:, 0]
        return {name: getattr(metrics, name)(predicted, self.values) for name in self.metrics}


@dataclass(frozen=True, eq=False)
class Words:
    """Sentences with a label for each word, in windows that fit the model."""

    windows: Sequence[TextWindow]
    tags: Sequence[Sequence[int]]
    labels: tuple[str, ...]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(window.ids) for window in self.windows])

    def batch(self, rows: np.ndarray) -> tuple[Packed, Tensor, Tensor]:
        """The windows, the rows at which a word begins, and the labels of these."""
        windows = [self.windows[row] for row in rows]
        labels_T = torch.tensor([x for each in windows for x in labels_of_words(each, self.tags[each.text])])
        rows_Q = (labels_T >= 0).nonzero().squeeze(1)
        return pack([window.ids for window in windows]), rows_Q, labels_T[rows_Q]

    def scores(self, logits: Sequence[Tensor]) -> dict[str, float]:
        windows: list[list[TextWindow]] = [[] for _ in self.tags]
        found: list[list[Tensor]] = [[] for _ in self.tags]
        for window, x_TC in zip(self.windows, logits, strict=True):
            windows[window.text].append(window)
            found[window.text].append(x_TC)
        best = [scores_of_words(*pair).argmax(1).tolist() for pair in zip(windows, found, strict=True)]
        predicted, wanted = ([[self.labels[tag] for tag in text] for text in side] for side in (best, self.tags))
        return {"entity_f1": metrics.entity_f1(predicted, wanted)}


def read(config: Config, file: str, tokenizer: Tokenizer, *, labels: tuple[str, ...] | None = None) -> Texts | Words:
    """A file as token ids. The labels are those of the task, of the options or, for words, of the training file."""
    if config.task == WORDS:
        return read_words(file, tokenizer, config.max_length, labels)
    if config.task == TEXTS:
        rows = list(read_labelled(file, labels=config.labels))
    else:
        rows = list(glue.read_glue(file, config.task))
    if not rows:
        raise ValueError(f"{file} has no rows")
    kinds = {type(row.label) for row in rows}
    if kinds != {int} and kinds != {float}:
        raise ValueError(f"{file} mixes kinds of labels, or has lists of them: give each text one class, or one number")
    if labels is None:
        known = config.labels if config.task == TEXTS else glue.TASKS[config.task].labels
        most = 1 + int(max(row.label for row in rows)) if kinds == {int} else 0
        labels = known or tuple(map(str, range(most)))
    values = np.array([row.label for row in rows], np.int64 if kinds == {int} else np.float32)
    if bool(labels) != (kinds == {int}) or (labels and values.max() >= len(labels)):
        raise ValueError(f"{file} has labels up to {values.max()}, but the training file has {len(labels)} classes")
    measured = TASKS[config.task].metrics if labels else ("pearson", "spearman")
    ids = tokenize_texts((row.text for row in rows), tokenizer, max_length=config.max_length)
    return Texts(ids, values, labels, measured)


def read_words(file: str, tokenizer: Tokenizer, max_length: int, labels: tuple[str, ...] | None) -> Words:
    rows = list(read_conll(file))
    if not rows:
        raise ValueError(f"{file} has no sentences")
    found = {tag for row in rows for tag in row.tags}
    labels = tuple(sorted(found, key=lambda tag: (tag != "O", tag))) if labels is None else labels
    if unknown := sorted(found - set(labels)):
        raise ValueError(f"{file} has the tag {unknown[0]!r}, which the training file has not: {', '.join(labels)}")
    words = [list(row.words) for row in rows]
    windows = tokenizer.encode_windows(words, max_length=max_length, is_split_into_words=True)
    return Words(windows, [[labels.index(tag) for tag in row.tags] for row in rows], labels)


def build(config: Config, learnt: Texts | Words) -> Classifier:
    """A new classifier on the encoder of `--model`, with the first layer of its head where it has one."""
    torch.manual_seed(config.seed)
    kind = HEADS.get(class_of(locate(config.model)) or "")
    start = Encoder.from_pretrained(config.model) if kind is None else kind.from_pretrained(config.model)
    encoder, head = (start, None) if isinstance(start, Encoder) else (start.model, start.head)
    if isinstance(learnt, Words):
        return TokenClassifier(encoder, labels=learnt.labels, head=head)
    problem = "single_label_classification" if learnt.labels else "regression"
    return SequenceClassifier(encoder, labels=learnt.labels or 1, problem_type=problem, head=head)


def batch_loss(model: Classifier, learnt: Texts | Words, rows: np.ndarray) -> BatchLoss:
    """The mean over the labels of a batch."""
    batch, rows_Q, labels = learnt.batch(rows)
    device = model.device
    if rows_Q is None:
        loss = model(batch.to(device), labels=labels.to(device)).loss
    else:
        loss = model(batch.to(device), rows=rows_Q.to(device), labels=labels.to(device)).loss
    return BatchLoss(loss, batch.num_tokens, {}, count=len(labels))


def evaluate(model: Classifier, data: Texts | Words) -> dict[str, float]:
    """The metrics of a file, and "score", their mean."""
    order = np.argsort(data.lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(np.cumsum(data.lengths[order]) // EVALUATED)) + 1
    logits: dict[int, Tensor] = {}
    for rows in np.split(order, cuts):
        batch = data.batch(rows)[0]
        x = model(batch.to(model.device)).float().cpu()
        parts = x.split(batch.lengths) if isinstance(data, Words) else x.unbind()
        logits |= zip(rows.tolist(), parts, strict=True)
    scores = data.scores([logits[row] for row in range(len(order))])
    return {"score": sum(scores.values()) / len(scores), **scores}


def inputs(config: Config) -> str:
    """A hash of what the run starts from."""
    files = (path for path in sorted(locate(config.model).iterdir()) if path.is_file())
    return digest([*files, Path(config.train), Path(config.dev)])


def save(model: Classifier, tokenizer: Tokenizer, output: Path, scores: Mapping[str, float]) -> None:
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    write_scores(output, scores)


def write_scores(output: Path, scores: Mapping[str, object]) -> None:
    with replacing(output / "scores.json") as beside:
        beside.write_text(json.dumps(scores, indent=2), encoding="utf-8")
    print("  ".join(f"{name} {value}" for name, value in scores.items()), flush=True)


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
