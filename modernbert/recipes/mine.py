"""Mine hard negatives for query-passage pairs: by BM25, by an Embedder, by a ColBERT, or by several of them.

    python -m modernbert.recipes.mine --pairs FOLDER --output FOLDER --sources bm25 random MODEL --mix 0.35 0.3 0.35

A negative scores less than 0.95 of the positive, by the score of the source that found it (NV-Retriever, as in
mxbai-edge). `--share 0.99 --eligible 50` is LateOn's rule. A stopped run goes on when the same command is started
again, to the same bytes. `OUTPUT/rows` has pairs with "negatives", for `embed`, `colbert` and `contrastive`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from modernbert.checkpoint import locate
from modernbert.config import SIZE
from modernbert.heads.colbert import ColBERT
from modernbert.heads.embedder import Embedder
from modernbert.heads.folders import class_of
from modernbert.train.claim import claim_folder
from modernbert.train.data import choose_pairs
from modernbert.train.examples import read_texts
from modernbert.train.mining import Filter, Random, Source, mine, quotas_of
from modernbert.train.mining_bm25 import BM25
from modernbert.train.mining_vectors import Vectors
from modernbert.train.options import AMOUNT, COUNT, SHARE, check_values, fixed, option, parse, run
from modernbert.train.passages import PassageFile
from modernbert.train.reading import digest, files
from modernbert.train.start import hash_of

WORDS, ANY = "bm25", "random"


@dataclass(frozen=True)
class Config:
    pairs: str = option("file or folder of rows with query and positive, see train/examples.py", free=True)
    output: str = option("folder of the run and its result", free=True)
    sources: tuple[str, ...] = option(
        f"{WORDS}, {ANY}, and folders or hub ids of an Embedder or a ColBERT", (WORDS,), free=True
    )
    mix: tuple[float, ...] = option("share of the negatives that each source gives; left out: equal shares", ())
    passages: str = option('file or folder of further passages, rows with a "text"', "", free=True)
    exclude_sources: tuple[str, ...] = option("sources of pairs that are left out", ())

    negatives: int = option("negatives of each pair; pairs with fewer are left out", 15, kind=SIZE)
    depth: int = option("candidates of each source", 200, kind=SIZE)
    share: float = option("negatives score less than this share of the positive; 0: any score", 0.95, kind=SHARE)
    margin: float | None = option("and at least this much less; left out: any", None, kind=AMOUNT)
    eligible: int = option("leave out pairs for which a source has fewer negatives to choose from", 0, kind=COUNT)
    candidates: int = option("passages of a query that MaxSim scores; 0: all, which is exact", 0, kind=COUNT)
    seed: int = option("seed of random negatives", 17, kind=COUNT)
    device: str = option("where models encode, such as cuda", "cpu", free=True)
    threads: int = option("threads of a CPU", 2, kind=SIZE)


def main(config: Config) -> int:
    """Mine what is left to mine; return the number of pairs with negatives."""
    check_values(config)
    mix = config.mix or (1.0,) * len(config.sources)
    if not config.sources or len(mix) != len(config.sources):
        raise ValueError(f"--mix has {len(mix)} shares for {len(config.sources)} sources: give one for each")
    quotas_of(mix, config.negatives)  # refuses what cannot be, before models encode for hours
    most = config.depth * len(config.sources)
    if config.negatives > most:
        raise ValueError(f"--depth {config.depth} gives {most} candidates at most, fewer than --negatives: raise it")
    if config.candidates and not any(map(is_colbert, config.sources)):
        raise ValueError("--candidates is for MaxSim, and none of --sources is a ColBERT: leave it out")
    torch.set_num_threads(config.threads)
    with claim_folder(config.output, "mine", fixed(config) | inputs(config)) as output:
        pairs = choose_pairs(config.pairs, exclude_sources=config.exclude_sources, decontaminate_against=())
        count = mine(
            pairs,
            output,
            lambda passages: list(zip(sources(config, passages, output), mix, strict=True)),
            negatives=config.negatives,
            depth=config.depth,
            filter=Filter(config.share or None, config.margin, config.eligible),
            more=Further(config.passages),
        )
    print(f"{count:,} of {len(pairs):,} pairs have {config.negatives} negatives, in {output / 'rows'}", flush=True)
    return count


@dataclass(frozen=True)
class Further:
    """The texts of a file or folder, read anew each time; none for ''."""

    source: str

    def __iter__(self) -> Iterator[str]:
        return read_texts(self.source, skip_empty=True) if self.source else iter(())


def sources(config: Config, passages: PassageFile, output: Path) -> Sequence[Source]:
    """The rankers of `--sources`."""
    kinds = {WORDS: partial(BM25, passages, output / WORDS), ANY: partial(Random, len(passages), config.seed)}
    return [
        kinds[name]() if name in kinds else vectors(config, passages, output / f"vectors-{number}", name)
        for number, name in enumerate(config.sources)
    ]


def vectors(config: Config, passages: PassageFile, folder: Path, name: str) -> Vectors:
    """A model as a source. `--candidates` is for those that are a ColBERT."""
    folder.mkdir(exist_ok=True)
    model = (ColBERT if is_colbert(name) else Embedder).from_pretrained(name, device=config.device, dtype="float32")
    return Vectors(model, passages, folder, candidates=config.candidates if is_colbert(name) else 0)


def is_colbert(name: str) -> bool:
    return name not in (WORDS, ANY) and class_of(locate(name)) == "ColBERT"


def inputs(config: Config) -> dict[str, object]:
    """What is mined from and with. Folders may move."""
    found = files(config.pairs) + (files(config.passages) if config.passages else [])
    rankers = [name if name in (WORDS, ANY) else hash_of(name) for name in config.sources]
    return {"hash of the inputs": digest(found), "sources": rankers}


if __name__ == "__main__":
    run(main, parse(Config, __doc__))
