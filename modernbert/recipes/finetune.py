"""Fine-tune a checkpoint on labelled texts, pairs of texts or words: tasks of GLUE, or your own files.

    python -m modernbert.recipes.finetune --task RTE --train FILE --dev FILE --model FOLDER --output FOLDER

The settings of a task of GLUE are those of ModernBERT-base (arXiv 2412.13663, table 6), where options are left out.
`--grid` runs the whole grid of the paper and finds the best point. A stopped run goes on when the same command is
started again. `OUTPUT/model` is the best model on the dev file, `OUTPUT/scores.json` its scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from modernbert.checkpoint import locate
from modernbert.config import FLAG, POSITIVE, SIZE
from modernbert.files import replacing
from modernbert.heads.classifier import SequenceClassifier
from modernbert.heads.token_classifier import TokenClassifier
from modernbert.tokenizer import Tokenizer
from modernbert.train import glue
from modernbert.train.checkpoints import BEST, load_weights
from modernbert.train.claim import claim_folder
from modernbert.train.distributed import Ranks, ranks
from modernbert.train.examples import read_conll, read_labelled
from modernbert.train.labelled import Classifier, Texts, Words
from modernbert.train.loop import fit
from modernbert.train.options import AMOUNT, COUNT, SHARE, check_values, fixed, option, parse, run
from modernbert.train.prepare import prepare
from modernbert.train.reading import digest, files
from modernbert.train.sampling import Sampler
from modernbert.train.schedules import warmup_stable_decay
from modernbert.train.start import encoder_of, start_model
from modernbert.train.validation import Validation

Data = Texts | Words


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


@dataclass(frozen=True)
class Config:
    task: str = option(f"one of {', '.join(TASKS)}; the last two are your own JSON lines and CoNLL")
    train: str = option("file to learn from: GLUE's train.tsv, rows of text, text_pair and label, or CoNLL", free=True)
    dev: str = option("file of the same kind, whose score finds the best checkpoint", free=True)
    model: str = option("folder or hub id of the checkpoint to start from", free=True)
    output: str = option("folder of the run and its result", free=True)
    labels: tuple[str, ...] = option(
        "names of the classes of texts, or of the tags of words; none: numbers, or the tags of --train", ()
    )
    grid: bool = option(
        "run the grid of the paper: 4 learning rates, 4 weight decays, 3 numbers of epochs", False, kind=FLAG
    )

    learning_rate: float | None = option("highest learning rate; left out: as published", None, kind=POSITIVE)
    weight_decay: float | None = option(
        "share of a weight that a step takes; left out: as published", None, kind=AMOUNT
    )
    epochs: int | None = option("passes over the training file; left out: as published", None, kind=SIZE)
    batch_size: int | None = option("texts of a step, over all ranks; left out: as published", None, kind=SIZE)
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
        with claim_folder(config.output, "finetune", fixed(config), group) as output:
            config = replace(config, output=str(output))
            found = {point: train(point, group) for point in points(config)}
            best = max(found, key=lambda point: found[point]["score"])
            group.on_first(lambda: write_scores(output, {**found[best], "best": Path(best.output).name}))
            return found[best]


def point_of(config: Config) -> Published:
    """The published settings of the task, with what the options say in their place."""
    point = TASKS[config.task]
    asked = {name: getattr(config, name, None) for name in point._fields}
    return point._replace(**{name: value for name, value in asked.items() if value is not None})


def with_published(config: Config) -> Config:
    """The config with the published values in place of what was left out."""
    found = point_of(config)._asdict()
    return replace(config, **{name: found[name] for name in found.keys() & vars(config).keys()})


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
    point, tokenizer = point_of(config), Tokenizer.from_pretrained(config.model)
    learnt = read(config, config.train, tokenizer, labels_of(config))
    dev = read(config, config.dev, tokenizer, learnt.labels)
    settings = fixed(config) | {"hash of train and model": inputs(config), "labels": learnt.labels}
    with claim_folder(config.output, "finetune", settings, group) as output:
        model = build(config, learnt).to(group.device)
        prepare(model, group)
        rows, rest = divmod(point.batch_size, group.world_size)
        if rest:
            raise ValueError(f"--batch-size {point.batch_size} cannot be cut into {group.world_size} ranks")
        batches = Sampler(learnt.lengths, max_rows=rows, seed=config.seed, rank=group.rank, world_size=group.world_size)
        epoch = max(1, sum(len(batch) >= group.world_size for batch in batches.plan(1)))
        steps = point.epochs * epoch
        fit(
            model,
            # The paper's decay is decoupled from the learning rate: the rate at its highest gives back its number.
            torch.optim.AdamW(
                model.parameters(),
                lr=point.learning_rate,
                betas=(0.9, 0.98),
                eps=1e-6,
                weight_decay=point.weight_decay / point.learning_rate,
            ),
            batches,
            partial(learnt.loss, model),
            output=output,
            settings=settings,
            steps=steps,
            schedule=partial(
                warmup_stable_decay, total=steps, warmup=config.warmup * steps, decay=(1 - config.warmup) * steps
            ),
            autocast=config.autocast,
            validation=Validation(partial(dev.scores, model), epoch, best="score", highest=True),
            ranks=group,
            save_minutes=config.save_minutes,
        )
        load_weights(output / BEST, model)
        model.eval()
        scores = dev.scores(model)
        group.on_first(lambda: save(model, tokenizer, output, scores))
        return scores


def labels_of(config: Config) -> Sequence[str] | None:
    """The names of the classes; None: those of the training file."""
    if config.task in glue.TASKS:
        return glue.TASKS[config.task].labels
    return config.labels or None


def read(config: Config, file: str, tokenizer: Tokenizer, labels: Sequence[str] | None) -> Data:
    """A file as token ids. ValueError: as the readers raise it, or with the name of the file."""
    try:
        if config.task == WORDS:
            return Words.from_rows(list(read_conll(file)), tokenizer, labels=labels, max_length=config.max_length)
        found = read_labelled(file, labels=config.labels) if config.task == TEXTS else glue.read_glue(file, config.task)
        measured = () if config.task == TEXTS else TASKS[config.task].metrics
        options = {"labels": labels, "measured": measured, "max_length": config.max_length}
        return Texts.from_rows(list(found), tokenizer, **options)
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from error


def build(config: Config, learnt: Data) -> Classifier:
    """A new classifier on the encoder of `--model`, with the first layer of its head where it has one."""
    torch.manual_seed(config.seed)
    start = start_model(config.model)
    encoder, head = encoder_of(start), getattr(start, "head", None)
    if isinstance(learnt, Words):
        return TokenClassifier(encoder, labels=learnt.labels, head=head)
    problem = "single_label_classification" if learnt.labels else "regression"
    return SequenceClassifier(encoder, labels=learnt.labels or 1, problem_type=problem, head=head)


def inputs(config: Config) -> str:
    """A hash of what the run starts from."""
    start = [path for path in sorted(locate(config.model).iterdir()) if path.is_file()]
    sources = [Path(config.train), Path(config.dev)]
    learnt = [file for path in sources for file in (files(path) if path.is_dir() else [path])]
    return digest([*start, *learnt])


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
