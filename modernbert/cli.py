"""The command line: `modernbert search`, `encode`, `info` and `demo`.

What needs torch is imported inside the commands, so that `modernbert --help` is instant.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

    from .config import EncoderConfig
    from .heads.colbert import ColBERT
    from .packing import Ragged
    from .retrieval.explain import WordMatch
    from .retrieval.search import Hit, MemoryIndex

ASSETS = Path(__file__).parent / "assets"
QUESTIONS = (
    "which foods protect the heart?",
    "how does hail form inside a storm?",
    "how do buildings survive an earthquake?",
)
NOTES_SHOWN = 5

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Model = Annotated[str | None, typer.Option(help="ColBERT folder or hub id; if not given, the built-in model.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. What the user can mend is said in one line on stderr, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        # Documents hold characters that the encoding of a terminal may lack; a "?" is better than a crash.
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    options = {"debug": False}
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _note(str(message))
        try:
            app(args=arguments, prog_name="modernbert", obj=options)
        except (ValueError, OSError) as error:
            if options["debug"]:
                raise
            print(f"modernbert: {_line(str(error))}", file=sys.stderr)
            sys.exit(2)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Search and encode text with ModernBERT, Ettin and ColBERT models."""
    context.obj["debug"] = debug


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Text or markdown, folders of it, or a BEIR corpus.jsonl[.gz]."),
    ],
    model: Model = None,
    top: Annotated[int, typer.Option(min=1, help="How many passages to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")] = False,
    why: Annotated[bool, typer.Option(help="Say which words matched.")] = True,
) -> None:
    """Rank the passages of files and folders by how well they answer a query."""
    index, seconds = _index(paths, model)
    hits = index.search([query], top_k=top)[0]
    words = _why(index.colbert, query, hits) if why else [[] for _ in hits]
    if as_json:
        found = [_as_dict(hit, matches if why else None) for hit, matches in zip(hits, words, strict=True)]
        print(json.dumps({"query": query, "passages": len(index), "hits": found}, indent=2), flush=True)
        return
    console = Console(highlight=False)
    _print_hits(console, hits, words)
    _print(console, Text(f"{_size(index)}, read and encoded in {seconds:.1f} s", style="dim"))


@app.command()
def encode(
    texts: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="JSON lines with a text field (BEIR), or lines of text."),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="A name ending in .npz or .safetensors.")],
    queries: Annotated[bool, typer.Option("--queries", help="Encode as queries, not as documents.")] = False,
    model: Model = None,
) -> None:
    """Encode texts to token vectors.

    The file holds the rows of all texts in `values`, their `ids`, and `offsets`: text i owns the rows from
    offset i to offset i + 1. In a safetensors file the ids are a JSON list in the metadata.
    """
    from .retrieval.corpus import read_texts

    if output.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--output is {output}, but its name must end in .npz or .safetensors")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output is {output}, but there is no folder {output.parent}")
    documents = list(read_texts(texts, note=_note))
    if not documents:
        raise ValueError(f"{texts} holds no text to encode")
    colbert = _colbert(model)
    encode_texts = colbert.encode_queries if queries else colbert.encode_documents
    vectors = encode_texts([document.content for document in documents])
    _write(output, vectors, [document.id for document in documents])
    rows, width = vectors.values.shape
    _note(f"wrote {len(vectors):,} texts, {rows:,} vectors of width {width}, to {output}")


@app.command()
def info(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Folder, hub id or preset; if not given, the built-in model.")
    ] = None,
) -> None:
    """Show what a checkpoint is: its sizes, what each layer uses, and how a ColBERT model reads text."""
    from .checkpoint import locate, read_json, read_state_dict
    from .config import PRESETS, EncoderConfig
    from .encoder import Encoder
    from .heads.colbert import ColBERT

    console = Console(highlight=False)
    if checkpoint in PRESETS and not Path(checkpoint).is_dir():
        import torch

        with torch.device("meta"):
            state = Encoder.from_config(checkpoint).state_dict()
        _print_encoder(console, f"preset {checkpoint}, no weights", PRESETS[checkpoint], state)
        return
    folder = locate(checkpoint or ASSETS / "default")
    config = EncoderConfig.from_hf(read_json(folder, "config.json"))
    _print_encoder(console, str(folder), config, read_state_dict(folder))
    if (folder / "modules.json").is_file():
        _print_facts(console, _colbert_facts(ColBERT.from_pretrained(folder)))


@app.command()
def demo(
    questions: Annotated[list[str] | None, typer.Argument(help="What to ask instead of the usual three.")] = None,
) -> None:
    """Search 1,581 paragraphs of Wikipedia, which ship with the package, using the built-in model."""
    console = Console(highlight=False)
    index, seconds = _index([ASSETS / "demo" / "corpus.jsonl.gz"], None)
    _print(console, Text(f"{_size(index)} (Wikipedia), read and encoded in {seconds:.1f} s\n", style="dim"))
    for question in questions or QUESTIONS:
        started = time.perf_counter()
        hits = index.search([question], top_k=3)[0]
        milliseconds = 1000 * (time.perf_counter() - started)
        _print(console, Text(question, style="bold") + Text(f"  {milliseconds:.0f} ms\n", style="dim not bold"))
        _print_hits(console, hits, _why(index.colbert, question, hits))


def _colbert(model: str | None) -> ColBERT:
    from .heads.colbert import ColBERT

    return ColBERT.default() if model is None else ColBERT.from_pretrained(model)


def _index(paths: Sequence[Path], model: str | None) -> tuple[MemoryIndex, float]:
    """The passages of `paths`, searchable, and the seconds that reading and encoding them took."""
    from .retrieval.corpus import read_passages

    started, notes = time.perf_counter(), []
    try:
        passages = list(read_passages(paths, note=notes.append))
    finally:  # The notes say why there is nothing to search, so they come before that error.
        for note in notes[:NOTES_SHOWN]:
            _note(note)
        if len(notes) > NOTES_SHOWN:
            _note(f"and {len(notes) - NOTES_SHOWN} more like these")
    reading = time.perf_counter() - started

    from .retrieval.search import MemoryIndex

    colbert = _colbert(model)
    started = time.perf_counter()
    index = MemoryIndex(colbert, passages)
    return index, reading + time.perf_counter() - started


def _why(colbert: ColBERT, query: str, hits: Sequence[Hit]) -> list[list[WordMatch]]:
    """For each hit the words that matched."""
    from .retrieval.explain import explain, strongest_words

    documents = [hit.passage.content for hit in hits]
    explained = zip(explain(colbert, query, documents), documents, strict=True)
    return [strongest_words(matches, query, document) for matches, document in explained]


def _as_dict(hit: Hit, words: list[WordMatch] | None) -> dict[str, Any]:
    why = {} if words is None else {"why": [asdict(word) for word in words]}
    return {"rank": hit.rank, "score": hit.score, **asdict(hit.passage), **why}


def _print_hits(console: Console, hits: Sequence[Hit], words: Sequence[Sequence[WordMatch]]) -> None:
    for hit, matches in zip(hits, words, strict=True):
        passage = hit.passage
        path, here = Path(passage.path), Path.cwd()
        place = f"{path.relative_to(here) if path.is_relative_to(here) else path}:{passage.line}"
        if passage.id != passage.path:
            place = f"{passage.id} in {place}"
        head = Text(f"{hit.rank}. {hit.score:.3f}  ", style="bold") + Text(_line(place), style="cyan not bold")
        _print(console, head)
        _print(console, Text(_line(passage.title), style="italic"), indent=3)
        _print(console, Text(_line(passage.text)), indent=3)
        if matches:
            found = [f"{word.query} → {word.document or '(passage)'} {word.contribution:.2f}" for word in matches]
            rest = hit.score - sum(word.contribution for word in matches)
            why = Text(f"why: {', '.join(found)}, other tokens {rest:.2f}", style="green")
            _print(console, why, indent=3)
        console.print()


def _print(console: Console, text: Text, indent: int = 0) -> None:
    """Wrapped and indented for a person; one line for a pipe, as `grep` wants it."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)


def _print_encoder(console: Console, name: str, config: EncoderConfig, state: dict[str, Tensor]) -> None:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    facts = {
        "checkpoint": name,
        "parameters": f"{sum(tensor.numel() for tensor in state.values()):,} in {', '.join(dtypes)}",
        "layers": f"{config.num_hidden_layers} of width {config.hidden_size}, MLP {config.intermediate_size}",
        "heads": f"{config.num_attention_heads} of width {config.head_dim}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest text": f"{config.max_position_embeddings:,} tokens",
    }
    _print_facts(console, facts)
    layers = Table("layer", "attention", "RoPE theta", "activation", box=None, header_style="dim")
    for layer in range(config.num_hidden_layers):
        reach = "global" if config.is_global(layer) else f"local, {config.window} each side"
        layers.add_row(str(layer), reach, f"{config.rope_theta(layer):,.0f}", config.hidden_activation)
    console.print(layers)


def _colbert_facts(colbert: ColBERT) -> dict[str, str]:
    config = colbert.config
    attended = "attended" if config.attend_to_expansion_tokens else "not attended"
    expansion = f", filled up with [MASK], {attended}" if config.do_query_expansion else ""
    return {
        "query": f"prefix {config.query_prefix!r}, at most {config.query_length} tokens{expansion}",
        "document": f"prefix {config.document_prefix!r}, at most {config.document_length} tokens",
        "skipped": " ".join(config.skiplist_words) or "no token",
        "head": ", then ".join(_dense(layer) for layer in colbert.dense),
    }


def _dense(layer: Any) -> str:
    parts = {
        type(layer.activation).__name__: True,
        "bias": layer.linear.bias is not None,
        "residual": layer.use_residual,
    }
    named = [name for name, there in parts.items() if there and name != "Identity"]
    return f"{layer.linear.in_features} -> {layer.linear.out_features}" + "".join(f" + {name}" for name in named)


def _print_facts(console: Console, facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(_line(value)))
    console.print(table)


def _size(index: MemoryIndex) -> str:
    documents = len({(passage.path, passage.id) for passage in index.passages})
    return f"{len(index):,} passages of {documents:,} documents"


def _write(output: Path, vectors: Ragged, ids: list[str]) -> None:
    """Write beside, then rename: whoever sees the file sees all of it."""
    import numpy as np
    from safetensors.numpy import save_file

    values, offsets = vectors.values.numpy(), vectors.offsets.numpy()
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        if output.suffix == ".npz":
            with beside.open("wb") as file:
                np.savez(file, values=values, offsets=offsets, ids=np.array(ids))
        else:
            save_file({"values": values, "offsets": offsets}, beside, metadata={"ids": json.dumps(ids)})
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)


def _line(text: str) -> str:
    """One line, without control characters that would drive the terminal."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)


def _note(message: str) -> None:
    print(f"note: {_line(message)}", file=sys.stderr)


if __name__ == "__main__":
    main()
