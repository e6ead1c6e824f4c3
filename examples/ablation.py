"""The recipe of a small retriever with one part changed at a time.

python examples/ablation.py --pairs PAIRS --teacher VECTORS --teacher-model MODEL --validation BEIR --output ABLATION

Five recipes follow one another: masked LM, L2 distillation of MODEL's vectors, contrastive learning, hard negatives,
and KL on MODEL's scores. `ROWS` has the changes. The steps of a stage that a row leaves out go to contrastive learning.
Rows have the same number of steps, but for those with twice as many. Rows that begin alike share these runs. The same
command goes on where it was stopped, and then prints the table again.

For each row and data set: nDCG@10, and the difference to the first row with its 95 % interval over queries.
ABLATION/rows has the metrics of each query, for `modernbert compare`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from modernbert import ColBERT, EncoderConfig, MaskedLM, Tokenizer
from modernbert.config import FLAG, SIZE
from modernbert.files import replacing
from modernbert.heads.colbert_files import ColBERTConfig
from modernbert.heads.folders import class_of
from modernbert.recipes import colbert, contrastive, distill, mine, mlm
from modernbert.retrieval.compare import compare, read_metrics
from modernbert.retrieval.evaluate import Metric
from modernbert.train.beir import beir_metrics
from modernbert.train.data import Pair, choose_pairs, first_per_source, read_corpus, without_overlap
from modernbert.train.examples import read_pairs, read_triples
from modernbert.train.options import COUNT, check_values, option, parse, run
from modernbert.train.start import start_colbert
from modernbert.train.teacher import Teacher, teach_embeddings, token_texts, write_teacher
from modernbert.train.vocabulary import train_cased_tokenizer, train_tokenizer

SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
LENGTHS: dict[str, Any] = {"query_length": 48, "document_length": 224}  # of the finished model
TEXT, LONGEST = 64, 96  # tokens of a text in training: the mean, about, and the most
WAYS = 8  # documents of a query for KL; half of them for contrastive learning with hard negatives
STYLES = ("searches", "keywords", "sentences")  # the sources that examples/query_styles.py makes
SHARES = {"mlm": 1, "distill": 1, "contrastive": 2, "negatives": 1, "kl": 1}
"""The stages in their order, each with its share of the steps."""
METRIC = "nDCG@10"


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in SHARES if name not in names)


@dataclass(frozen=True)
class Row:
    """The settings of a row of the table."""

    stages: tuple[str, ...] = tuple(SHARES)
    token_vectors: bool = True  # the teacher's, as the first token embeddings
    in_batch_kl: bool = False  # on the teacher's cosines, during contrastive learning
    optimizer: Literal["muon", "adamw"] = "adamw"  # of KL
    head: str = "residual"
    dim: int = 64
    lower_case: bool = True
    styles: bool = True
    layers: int = 3
    budget: int = 1  # times --steps
    seed: int = 0  # added to --seed

    @property
    def excluded(self) -> tuple[str, ...]:
        return () if self.styles else STYLES

    @property
    def shape(self) -> dict[str, Any]:
        return {**SHAPE, "num_hidden_layers": self.layers}


ROWS = {
    "base": Row(),
    "another seed": Row(seed=1),
    "twice the steps": Row(budget=2),
    "contrastive alone": Row(("contrastive",)),
    "contrastive alone, 6 layers": Row(("contrastive",), layers=6),
    "contrastive alone, twice the steps": Row(("contrastive",), budget=2),
    "no masked LM": Row(without("mlm")),
    "no L2 distillation": Row(without("distill")),
    "no hard negatives": Row(without("negatives")),
    "no KL": Row(without("kl")),
    "no contrastive": Row(without("contrastive")),
    "no token vectors": Row(token_vectors=False),
    "no teacher": Row(without("distill", "kl"), token_vectors=False),
    "linear head": Row(head="linear"),
    "no query styles": Row(styles=False),
    "cased": Row(lower_case=False),
    "48 numbers": Row(dim=48),
    "96 numbers": Row(dim=96),
    "128 numbers": Row(dim=128),
    "KL within the batch": Row(without("kl"), in_batch_kl=True),
    "Muon for KL": Row(optimizer="muon"),
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
        for place, name in enumerate(names, start=1):
            is_new = evaluate(config, data, name)
            if is_new or place == len(names):
                print(table(config, names[:place]), flush=True)


class Data:
    """What all rows learn from, made once: a sample of the pairs, and what is made of it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder, self.teacher, self.vocab_size = folder, config.teacher, config.vocab_size
        self.pairs, self.mined, self.scored = folder / "pairs.jsonl", folder / "mined", folder / "scored.jsonl"
        folder.mkdir(exist_ok=True)
        if not self.pairs.exists():
            write_rows(self.pairs, map(row_of, sample(config)))
        tokens = [text for lower in (True, False) for text in token_texts(self.tokenizer(lower))]
        write_teacher([*tokens, *self.all_texts()], config.teacher_model, config.teacher)
        options: dict[str, Any] = {"negatives": WAYS - 1, "sources": ("bm25", "random"), "mix": (0.7, 0.3)}
        options |= {"seed": config.seed, "threads": config.threads}
        mine.main(mine.Config(str(self.pairs), str(self.mined), **options))
        if not self.scored.exists():
            write_rows(self.scored, self.with_scores())

    def all_texts(self, excluded: tuple[str, ...] = ()) -> Iterator[str]:
        return (
            text for pair in read_pairs(self.pairs, exclude_sources=excluded) for text in (pair.query, pair.positive)
        )

    def texts(self, row: Row) -> str:
        """The file of texts for masked LM and distillation."""
        file = self.folder / f"texts-{'styles' if row.styles else 'plain'}.jsonl"
        if not file.exists():
            write_rows(file, ({"text": text} for text in self.all_texts(row.excluded)))
        return str(file)

    def tokenizer(self, lower: bool) -> Tokenizer:
        folder = self.folder / ("lower-case" if lower else "cased")
        if not (folder / "tokenizer.json").exists():
            train = train_tokenizer if lower else train_cased_tokenizer
            train(self.all_texts(), vocab_size=self.vocab_size).save_pretrained(folder)
        return Tokenizer.from_pretrained(folder)

    def with_scores(self) -> Iterator[dict[str, object]]:
        """The mined rows with the teacher's cosines."""
        teacher = Teacher(self.teacher)
        for pair in read_triples(self.mined / "rows"):
            documents = [pair.positive, *pair.negatives]
            query_1E, documents_NE = (teacher[teacher.index(texts)] for texts in ([pair.query], documents))
            scores = (documents_NE @ query_1E[0]).tolist()
            yield {"query": pair.query, "documents": documents, "scores": scores, "source": pair.source}

    def start(self, row: Row, seed: int) -> Path:
        """An encoder that has learnt nothing but, perhaps, what each token means to the teacher."""
        tokenizer, kind = self.tokenizer(row.lower_case), "taught" if row.token_vectors else "random"
        folder = self.folder / f"{kind}-{'lower-case' if row.lower_case else 'cased'}-{row.layers}-{seed}"
        if not folder.exists():
            torch.manual_seed(seed)
            ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
            shape = replace(EncoderConfig.preset("ettin-17m"), vocab_size=tokenizer.vocab_size, **row.shape, **ids)
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
    def seed(self) -> int:
        return self.config.seed + self.row.seed

    @property
    def common(self) -> dict[str, Any]:
        """What all recipes are given."""
        options = {"output": "", "seed": self.seed, "save_minutes": 60.0}
        return options | {"threads": self.config.threads, "autocast": self.config.autocast}

    def done(self, recipe: Any, config: Any) -> Path:
        """The model of a recipe, trained if it is not there. The settings name its folder; the start is one of them."""
        folder = Path(self.config.output, "runs", f"{recipe.__name__.split('.')[-1]}-{digest(repr(config))}")
        if not (folder / "model").exists():
            recipe.main(replace(config, output=str(folder)))
        return folder / "model"

    def with_head(self) -> str:
        """The start, with a new head of the row if it is not a ColBERT."""
        if class_of(self.start) == "ColBERT":
            return str(self.start)
        head, dim = self.row.head, self.row.dim
        folder = Path(self.config.output, "runs", f"head-{digest(f'{self.start} {head} {dim} {self.seed}')}")
        if not folder.exists():
            torch.manual_seed(self.seed)
            model = start_colbert(str(self.start), head=head, dim=dim, config=ColBERTConfig(**LENGTHS))
            model.save_pretrained(folder)
        return str(folder)


def digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=6).hexdigest()


def masked_lm(stage: Stage) -> Path:
    tokens, start = stage.config.tokens, str(stage.start)
    options: dict[str, Any] = {"texts": stage.data.texts(stage.row), "start": start, "tokenizer": start, "dropout": 0.0}
    options |= {"tokens": stage.steps * tokens, "batch_tokens": tokens, "rank_tokens": tokens, "longest": 256}
    return stage.done(mlm, mlm.Config(model="ettin-17m", **options, **stage.row.shape, **stage.common))


def l2_distillation(stage: Stage) -> Path:
    texts = max(1, stage.config.tokens // TEXT)
    options: dict[str, Any] = {"texts": (stage.data.texts(stage.row),), "teacher": stage.data.teacher}
    options |= {"batch_texts": texts, "rank_texts": texts, "max_length": LONGEST, "learning_rate": 1e-3}
    options |= {"model": str(stage.start), "steps": stage.steps}
    return stage.done(distill, distill.Config(**options, **stage.common))


def contrastive_learning(stage: Stage, **changes: Any) -> Path:
    options: dict[str, Any] = {"pairs": str(stage.data.pairs), "exclude_sources": stage.row.excluded}
    options |= {"start": stage.with_head(), "dim": stage.row.dim, "steps": stage.steps}
    options |= {"batch_tokens": stage.config.tokens, "train_document_length": LONGEST, **LENGTHS}
    options |= {"teacher": stage.data.teacher if stage.row.in_batch_kl else "", **changes}
    return stage.done(contrastive, contrastive.Config(**options, **stage.common))


def hard_negatives(stage: Stage) -> Path:
    mined = str(stage.data.mined / "rows")
    return contrastive_learning(stage, pairs=mined, hard_negatives=WAYS // 2, learning_rate=1e-3)


def kl(stage: Stage) -> Path:
    queries = max(1, stage.config.tokens // (WAYS * LONGEST))
    options: dict[str, Any] = {"rows": str(stage.data.scored), "exclude_sources": stage.row.excluded, "ways": WAYS}
    options |= {"model": stage.with_head(), "head": "keep", "lower_case": stage.row.lower_case, "steps": stage.steps}
    options |= {"batch_queries": queries, "rank_queries": queries, "train_document_length": LONGEST, **LENGTHS}
    options |= {"optimizer": stage.row.optimizer, "learning_rate": 5e-4}
    return stage.done(colbert, colbert.Config(**options, **stage.common))


RUNS: dict[str, Callable[[Stage], Path]] = {
    "mlm": masked_lm,
    "distill": l2_distillation,
    "contrastive": contrastive_learning,
    "negatives": hard_negatives,
    "kl": kl,
}


def train(config: Config, data: Data, row: Row) -> Path:
    """The model of a row. The steps of what it leaves out go to its contrastive stage, or to that with negatives."""
    shares = {name: SHARES[name] for name in row.stages}
    contrastive_stage = "contrastive" if "contrastive" in shares else "negatives"
    shares[contrastive_stage] += sum(SHARES.values()) - sum(shares.values())
    last, done, budget = data.start(row, config.seed + row.seed), 0, config.steps * row.budget
    for name, share in shares.items():
        steps = budget * (done + share) // sum(shares.values()) - budget * done // sum(shares.values())
        last, done = RUNS[name](Stage(config, data, row, last, steps)), done + share
    return last


def files(config: Config, name: str) -> dict[str, Path]:
    """The metrics of a row, by data set."""
    folder = Path(config.output, "rows", name.replace(" ", "-"))
    return {each: folder / f"{Path(each).name}.jsonl" for each in (config.validation, *config.evaluate)}


def evaluate(config: Config, data: Data, name: str) -> bool:
    """Train and measure a row, if it is not done. Whether there was anything to do."""
    missing = {each: file for each, file in files(config, name).items() if not file.exists()}
    if not missing:
        return False
    print(f"row: {name}", flush=True)
    model = ColBERT.from_pretrained(train(config, data, ROWS[name]))
    for each, file in missing.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        metrics = beir_metrics(each, model)()
        queries = metrics[0].per_query
        write_rows(file, ({"query": query, **{m.name: m.per_query[query] for m in metrics}} for query in queries))
    return True


def table(config: Config, names: Sequence[str]) -> str:
    """In Markdown: nDCG@10 of each row, and the interval of the difference to the first one."""
    sets = [Path(each).name for each in (config.validation, *config.evaluate)]
    lines = [f"| row | {' | '.join(sets)} | mean |", "| --- " * (len(sets) + 2) + "|"]
    rows = {name: [ndcg(read_metrics(file)) for file in files(config, name).values()] for name in names}
    for name, metrics in rows.items():
        cells = [f"{metric.mean:.3f}" for metric in metrics]
        if name != names[0]:
            changes = [compare([a], [b])[0] for a, b in zip(rows[names[0]], metrics, strict=True)]
            cells = [f"{cell} ({d.low:+.3f} to {d.high:+.3f})" for cell, d in zip(cells, changes, strict=True)]
        mean = sum(metric.mean for metric in metrics) / len(metrics)
        lines.append(f"| {name} | {' | '.join(cells)} | {mean:.3f} |")
    return "\n".join(lines)


def ndcg(metrics: Iterable[Metric]) -> Metric:
    return next(metric for metric in metrics if metric.name == METRIC)


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
