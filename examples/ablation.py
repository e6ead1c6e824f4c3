"""The recipe of a small retriever with one part changed at a time, all rows at the same number of steps.

python examples/ablation.py --pairs PAIRS --teacher VECTORS --teacher-model MODEL --validation BEIR --output ABLATION

Five recipes follow one another: masked LM, L2 distillation of MODEL's vectors, contrastive learning, hard negatives,
and KL on MODEL's scores. `ROWS` has the changes. The steps of a stage that a row leaves out go to contrastive learning.
Rows that begin alike share these runs. The same command goes on where it was stopped, and then prints the table again.

For each row and data set: nDCG@10, and the difference to the first row with its 95 % interval over queries.
ABLATION/rows has the metrics of each query, for `modernbert compare`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from modernbert import ColBERT, EncoderConfig, MaskedLM, Tokenizer
from modernbert.config import FLAG, SIZE
from modernbert.files import replacing
from modernbert.heads.colbert_files import ColBERTConfig
from modernbert.heads.folders import class_of
from modernbert.recipes import colbert, contrastive, distill, embed, mine, mlm
from modernbert.retrieval.compare import compare, read_metrics
from modernbert.retrieval.evaluate import Metric
from modernbert.train.beir import beir_metrics
from modernbert.train.data import Pair, choose_pairs, first_per_source, read_corpus, without_overlap
from modernbert.train.examples import read_pairs, read_triples
from modernbert.train.options import COUNT, check_values, option, parse, run
from modernbert.train.start import start_colbert
from modernbert.train.teacher import Teacher, teach_embeddings, token_texts, write_teacher
from modernbert.train.vocabulary import train_cased_tokenizer, train_tokenizer

SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LENGTHS = {"query_length": 48, "document_length": 224}  # of the finished model
TEXT, TRAINED = 64, 96  # tokens of a text of the sample on average, about; and at most
WAYS = 8  # documents of a query for KL; half of them for contrastive learning with hard negatives
STYLES = ("searches", "keywords", "sentences")  # the sources that examples/query_styles.py makes
STAGES = ("mlm", "distill", "contrastive", "negatives", "kl")
REPORT = ("mlm", "embed", "tune", "distill", "kl")  # the order of mxbai-edge: one vector a text until the last stage
SHARES = {"contrastive": 2, "embed": 2}  # of the steps; of any other stage 1
METRIC = "nDCG@10"


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in STAGES if name not in names)


@dataclass(frozen=True)
class Row:
    """The settings of a row of the table."""

    stages: tuple[str, ...] = STAGES
    token_vectors: bool = True  # the teacher's, as the first token embeddings
    in_batch_kl: bool = False
    optimizer: str = "adamw"  # of KL
    head: str = "residual"
    dim: int = 64
    lower_case: bool = True
    styles: bool = True
    seed: int = 0  # added to --seed

    @property
    def excluded(self) -> tuple[str, ...]:
        return () if self.styles else STYLES


ROWS = {
    "base": Row(),
    "another seed": Row(seed=1),
    "no masked LM": Row(without("mlm")),
    "no L2 distillation": Row(without("distill")),
    "no hard negatives": Row(without("negatives")),
    "no KL": Row(without("kl")),
    "contrastive alone": Row(("contrastive",)),
    "no token vectors": Row(token_vectors=False),
    "no teacher": Row(without("distill", "kl"), token_vectors=False),
    "linear head": Row(head="linear"),
    "KL within the batch": Row(without("kl"), in_batch_kl=True),
    "no query styles": Row(styles=False),
    "Muon for KL": Row(optimizer="muon"),
    "cased": Row(lower_case=False),
    "48 numbers": Row(dim=48),
    "128 numbers": Row(dim=128),
    "96 numbers": Row(dim=96),
    "no contrastive": Row(without("contrastive")),
    "order of the report": Row(REPORT),
}


@dataclass(frozen=True)
class Config:
    pairs: str = option("file or folder of rows of query and positive")
    teacher: str = option("folder of the teacher's vectors, to which those that it lacks are added")
    teacher_model: str = option("sentence-transformers model that makes them")
    validation: str = option("BEIR folder of held-out pairs")
    output: str = option("folder of all runs")
    evaluate: tuple[str, ...] = option("BEIR folders, besides --validation; pairs that overlap are left out", ())
    rows: tuple[str, ...] = option("names of rows, the first one to compare with; left out: all", ())
    steps: int = option("steps of a row", 150, kind=SIZE)
    tokens: int = option("tokens of a step, about", 6_000, kind=SIZE)
    per_source: int = option("most pairs of a source", 600, kind=SIZE)
    vocab_size: int = option("tokens of the vocabulary", 8_192, kind=SIZE)
    seed: int = option("seed of the rows, and of the sample of pairs", 17, kind=COUNT)
    threads: int = option("threads of a CPU", 1, kind=SIZE)
    autocast: bool = option("compute in bfloat16", False, kind=FLAG)


def main(config: Config) -> None:
    check_values(config)
    names = config.rows or tuple(ROWS)
    if unknown := set(names) - set(ROWS):
        raise ValueError(f"--rows has {min(unknown)!r}, but must be of {', '.join(ROWS)}")
    torch.set_num_threads(config.threads)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / ".lock"):  # a second run waits
        data = Data(config, output / "data")
        for name in names:
            evaluate(config, data, name)
            print(table(config, names[: names.index(name) + 1]), flush=True)


class Data:
    """What all rows learn from, made once: a sample of the pairs, and what is made of it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder, self.teacher, self.seed = folder, config.teacher, config.seed
        self.pairs = folder / "pairs.jsonl"
        self.mined, self.scored = folder / "mined" / "rows", folder / "scored.jsonl"
        folder.mkdir(exist_ok=True)
        if not self.pairs.exists():
            write_rows(self.pairs, map(row_of, sample(config)))
        self.tokenizers = {lower: self.tokenizer(lower, config.vocab_size) for lower in (True, False)}
        tokens = [text for tokenizer in self.tokenizers.values() for text in token_texts(tokenizer)]
        write_teacher([*tokens, *self.all_texts()], config.teacher_model, config.teacher)
        options = {"negatives": WAYS - 1, "sources": ("bm25", "random"), "mix": (0.7, 0.3), "threads": config.threads}
        mine.main(mine.Config(str(self.pairs), str(folder / "mined"), seed=config.seed, **options))
        if not self.scored.exists():
            write_rows(self.scored, self.with_scores())

    def all_texts(self, exclude_sources: tuple[str, ...] = ()) -> Iterator[str]:
        pairs = read_pairs(self.pairs, exclude_sources=exclude_sources)
        return (text for pair in pairs for text in (pair.query, pair.positive))

    def texts(self, row: Row) -> str:
        """The file of texts of masked LM and of distillation."""
        file = self.folder / f"texts-{row.styles:d}.jsonl"
        if not file.exists():
            write_rows(file, ({"text": text} for text in self.all_texts(row.excluded)))
        return str(file)

    def tokenizer(self, lower: bool, vocab_size: int) -> Tokenizer:
        folder = self.folder / ("lower-case" if lower else "cased")
        if not (folder / "tokenizer.json").exists():
            train = train_tokenizer if lower else train_cased_tokenizer
            train(self.all_texts(), vocab_size=vocab_size).save_pretrained(folder)
        return Tokenizer.from_pretrained(folder)

    def with_scores(self) -> Iterator[dict[str, object]]:
        """The mined rows with the teacher's cosines."""
        teacher = Teacher(self.teacher)
        for pair in read_triples(self.mined):
            documents = [pair.positive, *pair.negatives]
            query_1E, documents_NE = (teacher[teacher.index(texts)] for texts in ([pair.query], documents))
            scores = (documents_NE @ query_1E[0]).tolist()
            yield {"query": pair.query, "documents": documents, "scores": scores, "source": pair.source}

    def start(self, row: Row, seed: int) -> Path:
        """An encoder that has learnt nothing but, perhaps, what each token means."""
        tokenizer = self.tokenizers[row.lower_case]
        folder = self.folder / f"start-{'lower-case' if row.lower_case else 'cased'}-{row.token_vectors:d}-{seed}"
        if not folder.exists():
            torch.manual_seed(seed)
            ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
            shape = replace(EncoderConfig.preset("ettin-17m"), vocab_size=tokenizer.vocab_size, **SHAPE, **ids)
            model = MaskedLM.from_config(shape)
            if row.token_vectors:
                table, deviation = model.model.embeddings.tok_embeddings.weight, shape.initializer_range
                teach_embeddings(table, tokenizer, Teacher(self.teacher), deviation=deviation)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder


def sample(config: Config) -> Iterable[Pair]:
    pairs = choose_pairs(config.pairs, exclude_sources=(), decontaminate_against=())
    chosen = first_per_source(pairs, config.per_source, seed=config.seed)
    return without_overlap(chosen, (text for folder in config.evaluate for text in read_corpus(folder)))


def row_of(pair: Pair) -> dict[str, object]:
    return {"query": pair.query, "positive": pair.positive, "source": pair.source, "group": pair.group}


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Stage:
    """A stage of a row: where it starts, and its steps."""

    config: Config
    data: Data
    row: Row
    start: Path
    steps: int

    @property
    def texts(self) -> int:
        """Texts of a step."""
        return max(2, self.config.tokens // TEXT)

    def common(self, kind: type) -> dict[str, Any]:
        """What the recipe with these settings shares with the others."""
        options = {
            "model": str(self.start),
            "exclude_sources": self.row.excluded,
            "steps": self.steps,
            "seed": self.config.seed + self.row.seed,
            "threads": self.config.threads,
            "autocast": self.config.autocast,
            "save_minutes": 60.0,
            "output": "",
        }
        return {name: options[name] for name in options.keys() & {field.name for field in fields(kind)}}

    def done(self, recipe: Any, config: Any) -> Path:
        """The model of a recipe, trained if it is not there. The settings name its folder; the start is one of them."""
        folder = Path(self.config.output, "runs", f"{recipe.__name__.split('.')[-1]}-{digest(repr(config))}")
        if not (folder / "model").exists():
            recipe.main(replace(config, output=str(folder)))
        return folder / "model"


def digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=6).hexdigest()


def masked_lm(stage: Stage) -> Path:
    tokens = {"tokens": stage.steps * stage.config.tokens, "batch_tokens": stage.config.tokens}
    options = stage.common(mlm.Config) | {
        "model": "ettin-17m",
        "start": str(stage.start),
        "tokenizer": str(stage.start),
    }
    options |= {"longest": 256, "rank_tokens": stage.config.tokens, "dropout": 0.0, **tokens, **SHAPE}
    return stage.done(mlm, mlm.Config(texts=stage.data.texts(stage.row), **options))


def l2_distillation(stage: Stage) -> Path:
    options = {"batch_texts": stage.texts, "rank_texts": stage.texts, "max_length": TRAINED, "learning_rate": 1e-3}
    return stage.done(
        distill,
        distill.Config(
            (stage.data.texts(stage.row),), teacher=stage.data.teacher, **options, **stage.common(distill.Config)
        ),
    )


def contrastive_learning(stage: Stage, **changes: Any) -> Path:
    """From the start with the head of the row, if it is not a ColBERT."""
    options = {"start": with_head(stage), "dim": stage.row.dim, "batch_tokens": stage.config.tokens}
    options |= {"train_document_length": TRAINED, "vocab_size": stage.config.vocab_size, **LENGTHS}
    if stage.row.in_batch_kl:
        options["teacher"] = stage.data.teacher
    options |= {"pairs": str(stage.data.pairs), **changes}
    return stage.done(contrastive, contrastive.Config(**options, **stage.common(contrastive.Config)))


def hard_negatives(stage: Stage) -> Path:
    """At half of the learning rate, as a second stage."""
    changes = {"pairs": str(stage.data.mined), "hard_negatives": WAYS // 2, "learning_rate": 1e-3}
    return contrastive_learning(stage, **changes)


def kl(stage: Stage) -> Path:
    queries = max(2, stage.config.tokens // (WAYS * TRAINED))
    options = {"ways": WAYS, "batch_queries": queries, "rank_queries": queries, "optimizer": stage.row.optimizer}
    options |= {"lower_case": stage.row.lower_case, "train_document_length": TRAINED, "learning_rate": 5e-4, **LENGTHS}
    options |= stage.common(colbert.Config) | {"model": with_head(stage), "head": "keep"}
    return stage.done(colbert, colbert.Config(str(stage.data.scored), **options))


def one_vector(stage: Stage, **changes: Any) -> Path:
    options = {"pairs": str(stage.data.pairs), "batch_pairs": stage.texts // 2, "learning_rate": 2e-3, **changes}
    options |= {"max_length": TRAINED, "chunk_tokens": stage.config.tokens, **stage.common(embed.Config)}
    return stage.done(embed, embed.Config(**options))


def one_vector_tuned(stage: Stage) -> Path:
    pairs = max(2, stage.texts // (2 + WAYS // 2))
    options = {"pairs": str(stage.data.mined), "negatives": WAYS // 2, "batch_pairs": pairs, "learning_rate": 1e-3}
    return one_vector(stage, stage="finetune", **options)


RUNS: dict[str, Callable[[Stage], Path]] = {
    "mlm": masked_lm,
    "distill": l2_distillation,
    "contrastive": contrastive_learning,
    "negatives": hard_negatives,
    "kl": kl,
    "embed": one_vector,
    "tune": one_vector_tuned,
}


def with_head(stage: Stage) -> str:
    """The start, with a new head of the row if it is not a ColBERT."""
    if class_of(stage.start) == "ColBERT":
        return str(stage.start)
    row, seed = stage.row, stage.config.seed + stage.row.seed
    folder = Path(stage.config.output, "runs", f"head-{digest(f'{stage.start} {row.head} {row.dim} {seed}')}")
    if not folder.exists():
        torch.manual_seed(seed)
        start_colbert(str(stage.start), head=row.head, dim=row.dim, config=ColBERTConfig(**LENGTHS)).save_pretrained(
            folder
        )
    return str(folder)


def train(config: Config, data: Data, row: Row) -> Path:
    """The model of a row."""
    # What a row leaves out goes to its stage of contrastive learning, or to that with negatives.
    shares = {name: SHARES.get(name, 1) for name in row.stages}
    longest = max(shares, key=lambda name: (shares[name], name == "negatives"))
    shares[longest] += sum(SHARES.get(name, 1) for name in STAGES) - sum(shares.values())
    last, total = data.start(row, config.seed + row.seed), 0
    for name in row.stages:
        before, total = total, total + shares[name]
        steps = [config.steps * each // sum(shares.values()) for each in (before, total)]
        last = RUNS[name](Stage(config, data, row, last, steps[1] - steps[0]))
    return last


def files(config: Config, name: str) -> dict[str, Path]:
    """The metrics of a row, by data set."""
    folder = Path(config.output, "rows", name.replace(" ", "-"))
    return {each: folder / f"{Path(each).name}.jsonl" for each in (config.validation, *config.evaluate)}


def evaluate(config: Config, data: Data, name: str) -> None:
    missing = {each: file for each, file in files(config, name).items() if not file.exists()}
    if missing:
        print(f"row: {name}", flush=True)
        model = ColBERT.from_pretrained(str(train(config, data, ROWS[name])))
        for each, file in missing.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            metrics = beir_metrics(each, model)()
            queries = metrics[0].per_query
            write_rows(file, ({"query": q, **{m.name: m.per_query[q] for m in metrics}} for q in queries))


def table(config: Config, names: Sequence[str]) -> str:
    """In Markdown: nDCG@10 of each row, and the difference to the first one with its interval."""
    sets = [Path(each).name for each in (config.validation, *config.evaluate)]
    lines = [f"| row | {' | '.join(sets)} | mean |", "|---" * (len(sets) + 2) + "|"]
    first = [read_metrics(file) for file in files(config, names[0]).values()]
    for name in names:
        metrics = [read_metrics(file) for file in files(config, name).values()]
        means = [of_set(each).mean for each in metrics]
        cells = [f"{mean:.3f}" for mean in means]
        if name != names[0]:
            changes = [compare([of_set(a)], [of_set(b)])[0] for a, b in zip(first, metrics, strict=True)]
            cells = [f"{cell} ({d.low:+.3f} to {d.high:+.3f})" for cell, d in zip(cells, changes, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(means) / len(means):.3f} |")
    return "\n".join(lines)


def of_set(metrics: Iterable[Metric]) -> Metric:
    return next(metric for metric in metrics if metric.name == METRIC)


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
