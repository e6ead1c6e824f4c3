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
    from .heads.colbert import ColBERT
    from .packing import Ragged
    from .retrieval.explain import WordMatch
    from .retrieval.search import Hit, MemoryIndex

ASSETS = Path(__file__).parent / "assets"
QUESTIONS = (
    "how does an Armenian priest become a member of the brotherhood?",
    "why do doctors use acronyms?",
    "which animals live in the wetlands of Manipur?",
)
NOTES_SHOWN = 5

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Model = Annotated[str | None, typer.Option(help="ColBERT folder or hub id. Default: the small model in the package.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. What the user can mend is said in one line on stderr with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        # Documents hold characters that a terminal's encoding may lack; a "?" is better than a crash.
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
    context: typer.Context, debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False
) -> None:
    """Search and encode text with ModernBERT, Ettin and ColBERT models."""
    context.obj["debug"] = debug


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Folders and files of text or markdown, or a BEIR corpus.jsonl[.gz]."),
    ],
    model: Model = None,
    top: Annotated[int, typer.Option(min=1, help="How many passages to print.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
    why: Annotated[bool, typer.Option(help="Say which words matched.")] = True,
) -> None:
    """Rank the passages of files and folders by how well they answer QUERY."""
    index, seconds = _index(paths, model)
    hits = index.search([query], top_k=top)[0]
    words = _why(index.colbert, query, hits) if why else None
    if as_json:
        found = [_as_dict(hit, words[i] if words else None) for i, hit in enumerate(hits)]
        print(json.dumps({"query": query, "passages": len(index), "hits": found}, indent=2))
        return
    console = Console(highlight=False)
    _print_hits(console, hits, words)
    _dim(console, f"{_size(index)}, read and encoded in {seconds:.1f} s")


@app.command()
def encode(
    input: Annotated[Path, typer.Argument(help="JSON lines with a text field (BEIR), or any file with a text on each line.")],
    output: Annotated[Path, typer.Option(help="FILE.npz or FILE.safetensors.", show_default=False)],
    queries: Annotated[bool, typer.Option("--queries", help="Encode as queries instead of documents.")] = False,
    model: Model = None,
) -> None:
    """Encode texts to token vectors.

    The file holds the rows of all texts in `values`, `offsets` (text i owns the rows from offset i to offset i + 1) and
    `ids`; in a safetensors file the ids are a JSON list in the metadata.
    """
    from .retrieval.corpus import read_records

    if output.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--output is {output}: its name must end in .npz or .safetensors")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output is {output}: there is no folder {output.parent}")
    records = list(read_records(input, note=_note))
    if not records:
        raise ValueError(f"{input} holds no text to encode")
    colbert = _colbert(model)
    texts = [record.content for record in records]
    vectors = colbert.encode_queries(texts) if queries else colbert.encode_documents(texts)
    _write(output, vectors, [record.id for record in records])
    _note(f"{len(texts)} texts, {len(vectors.values)} vectors of width {vectors.values.shape[1]} written to {output}")


@app.command()
def info(
    checkpoint: Annotated[str | None, typer.Argument(help="Folder or hub id. Default: the small model in the package.")] = None,
) -> None:
    """Say what a checkpoint is: its sizes, what each layer uses, and how a ColBERT model reads text."""
    from .checkpoint import locate, read_json, read_state_dict
    from .config import EncoderConfig
    from .heads.colbert import ColBERT

    folder = locate(checkpoint or ASSETS / "default")
    config = EncoderConfig.from_hf(read_json(folder, "config.json"))
    state = read_state_dict(folder)
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    console = Console(highlight=False)
    _facts(
        console,
        {
            "checkpoint": str(folder),
            "parameters": f"{sum(tensor.numel() for tensor in state.values()):,} in {', '.join(kinds)}",
            "layers": f"{config.num_hidden_layers} of width {config.hidden_size}, MLP {config.intermediate_size}",
            "heads": f"{config.num_attention_heads} of width {config.head_dim}",
            "vocabulary": f"{config.vocab_size:,}",
            "longest text": f"{config.max_position_embeddings:,} tokens",
        },
    )
    layers = Table("layer", "attention", "window", "theta", "activation", box=None, header_style="dim")
    for layer in range(config.num_hidden_layers):
        kind, window = ("global", "all") if config.is_global(layer) else ("local", f"{config.window} each side")
        layers.add_row(str(layer), kind, window, f"{config.rope_theta(layer):,.0f}", config.hidden_activation)
    console.print(layers)
    if (folder / "modules.json").is_file():
        _facts(console, _colbert_facts(ColBERT.from_pretrained(folder)))


@app.command()
def demo(
    questions: Annotated[list[str] | None, typer.Argument(help="Questions to ask instead of the three built-in ones.")] = None,
) -> None:
    """Search 1,581 paragraphs of Wikipedia, which are in the package, with the small model, which is too."""
    console = Console(highlight=False)
    index, seconds = _index([ASSETS / "demo" / "corpus.jsonl.gz"], None)
    _dim(console, f"{_size(index)} of Wikipedia (CC-BY-4.0), read and encoded in {seconds:.1f} s\n")
    for question in questions or QUESTIONS:
        started = time.perf_counter()
        hits = index.search([question], top_k=3)[0]
        milliseconds = 1000 * (time.perf_counter() - started)
        _show(console, Text(question, style="bold"))
        _dim(console, f"{milliseconds:.0f} ms\n")
        _print_hits(console, hits, _why(index.colbert, question, hits))


def _colbert(model: str | None) -> ColBERT:
    from .heads.colbert import ColBERT

    return ColBERT.default() if model is None else ColBERT.from_pretrained(model)


def _index(paths: Sequence[Path], model: str | None) -> tuple[MemoryIndex, float]:
    """Documents read and encoded, and the seconds it took (loading the model aside)."""
    from .retrieval.corpus import read_passages

    started, notes = time.perf_counter(), []
    try:
        passages = list(read_passages(paths, note=notes.append))
    finally:  # The notes say why nothing was found, so they come before that error.
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
    explanations = explain(colbert, query, documents)
    return [strongest_words(matches, query, text) for matches, text in zip(explanations, documents, strict=True)]


def _as_dict(hit: Hit, words: list[WordMatch] | None) -> dict[str, Any]:
    why = {} if words is None else {"why": [asdict(word) for word in words]}
    return {"rank": hit.rank, "score": hit.score, **asdict(hit.passage), **why}


def _print_hits(console: Console, hits: Sequence[Hit], words: list[list[WordMatch]] | None) -> None:
    for i, hit in enumerate(hits):
        passage = hit.passage
        name = f"{passage.path}:{passage.line}" if passage.id == passage.path else f"{passage.id} in {passage.path}"
        head = Text(f"{hit.rank}. {hit.score:.3f}  ", style="bold") + Text(_line(name), style="cyan not bold")
        _show(console, head)
        _show(console, Text(_line(passage.title), style="italic"), indent=3)
        _show(console, Text(_line(passage.text)), indent=3)
        if words is not None:
            found = [f"{word.query} → {_line(word.document or 'passage')} {word.contribution:.2f}" for word in words[i]]
            rest = hit.score - sum(word.contribution for word in words[i])
            _show(console, Text(f"why: {', '.join([*found, f'the rest {rest:.2f}'])}", style="green"), indent=3)
        console.print()


def _show(console: Console, text: Text, indent: int = 0) -> None:
    """Wrapped under its indent for a person; one line, as `grep` and `cut` want it, for a pipe."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent) + text, soft_wrap=True)


def _facts(console: Console, facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(_line(value)))
    console.print(table)


def _colbert_facts(colbert: ColBERT) -> dict[str, str]:
    dense = " -> ".join(str(layer) for layer in colbert.dense)
    expansion = "attended" if colbert.attend_to_expansion_tokens else "not attended"
    return {
        "query": f"{colbert.query_prefix!r}, {colbert.query_length} tokens"
        + (f", filled up with [MASK] ({expansion})" if colbert.do_query_expansion else ""),
        "document": f"{colbert.document_prefix!r}, {colbert.document_length} tokens",
        "skipped": " ".join(colbert.skiplist_words) or "no token",
        "dense": dense,
    }


def _size(index: MemoryIndex) -> str:
    documents = len({(passage.path, passage.id) for passage in index.passages})
    return f"{len(index):,} passages of {documents:,} documents"


def _write(output: Path, vectors: Ragged, ids: list[str]) -> None:
    """Write beside, then rename: whoever sees the file sees all of it."""
    import numpy as np
    from safetensors.numpy import save_file

    arrays = {"values": vectors.values.numpy(), "offsets": vectors.offsets.numpy()}
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        if output.suffix == ".npz":
            with beside.open("wb") as file:
                np.savez(file, ids=np.array(ids), **arrays)
        else:
            save_file(arrays, beside, metadata={"ids": json.dumps(ids)})
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)


def _line(text: str) -> str:
    """One line without control characters, which could drive the terminal."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def _dim(console: Console, text: str) -> None:
    _show(console, Text(text, style="dim"))


def _note(message: str) -> None:
    print(f"note: {_line(message)}", file=sys.stderr)


if __name__ == "__main__":
    main()
