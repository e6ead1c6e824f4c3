"""Which versions of other libraries this one works with: checks, an environment for each row, and the table of them.

    python tests/compatibility.py check [CHECK ...]    the checks in this environment, as a line of JSON
    python tests/compatibility.py run FOLDER [NAME ...] make the environments in FOLDER, with pip, and check in each
    python tests/compatibility.py table                write the table of docs/compatibility.md

`run` replaces the lines of these environments in docs/compatibility.jsonl. An environment takes 1 to 2 GB.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modernbert import ColBERT, Embedder, Encoder, EncoderConfig, MaskedLM, Reranker, SequenceClassifier, Tokenizer
from modernbert.integrations.transformers import pack_in_place

ROOT = Path(__file__).parents[1]
ROWS, PAGE = ROOT / "docs" / "compatibility.jsonl", ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- versions: tests/compatibility.py -->\n", "<!-- end of versions -->\n"

NEWEST = ["torch==2.13.0", "transformers==5.23.0", "sentence-transformers==6.2.0"]
OLDER = ["sentence-transformers==5.3.0", "onnx"]
OPTIMUM_ONNX = ["optimum==2.1.0", "optimum-onnx==0.1.0", "onnxruntime"]
ENVIRONMENTS: dict[str, list[str]] = {
    "newest": NEWEST,
    "torch-2.11": ["torch==2.11.0", *NEWEST[1:]],
    # optimum-intel is for transformers up to 5.5, optimum-onnx up to 4.57. The former needs torchvision, whose wheel on
    # PyPI does not load beside a CPU build of torch. Of torch 2.11 pip takes the build of PyPI.
    "transformers-5.3": ["torch==2.11.0", *OLDER, "transformers==5.3.0", "optimum-intel==2.2.0", "openvino"],
    "transformers-4.57": ["torch==2.13.0", *OLDER, "transformers==4.57.6", *OPTIMUM_ONNX],
    "pylate": ["torch==2.11.0", "pylate==1.6.0"],  # whose index is built for torch 2.11
}
"""What pip installs for each row, beside this library."""

PACKAGES = ("torch", "transformers", "sentence-transformers", "pylate", "optimum-onnx", "optimum-intel")
# The CrossEncoder of sentence-transformers 5 does not lower-case texts, whatever the folder says.
TEXTS = ["how do i fold a tensor?", "the gradient of the norm, with respect to x.", "a " * 60, "x"]
TOLERANCE = 2e-5


def tokenizer() -> Tokenizer:
    return ColBERT.default().tokenizer


def encoder() -> Encoder:
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=tokenizer().vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=16,
    )
    return Encoder(config).eval()


def same(found: Iterable[Any], wanted: Iterable[Any]) -> None:
    """Float32 on both sides, so that only the order of the sums differs."""
    for mine, theirs in zip(found, wanted, strict=True):
        mine, theirs = torch.as_tensor(mine).detach(), torch.as_tensor(theirs).detach()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE * max(1.0, theirs.abs().max().item()))


def padded() -> tuple[dict[str, Tensor], Tensor]:
    """Texts of very different lengths as a padded batch, and where their tokens are."""
    ids = [torch.tensor(one.ids) for one in tokenizer().encode_batch(TEXTS, offsets=False)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), "attention_mask": mask}, mask.bool()


def checkpoints(folder: Path) -> None:
    """`Encoder` and `AutoModel` load what the other saved."""
    from transformers import AutoModel

    model, (batch, real) = encoder(), padded()
    model.save_pretrained(folder / "ours")
    theirs = AutoModel.from_pretrained(folder / "ours", attn_implementation="sdpa").eval()
    wanted = theirs(**batch).last_hidden_state[real]
    theirs.save_pretrained(folder / "theirs")
    for each in (model, Encoder.from_pretrained(folder / "theirs")):
        same([each(**batch).last_hidden_state[real]], [wanted])


def heads(folder: Path) -> None:
    """`MaskedLM` and `SequenceClassifier` in transformers."""
    import transformers

    batch, real = padded()
    for model, name in (
        (MaskedLM(encoder()), "MaskedLM"),
        (SequenceClassifier(encoder(), labels=3), "SequenceClassification"),
    ):
        model.eval().save_pretrained(folder / name)
        theirs = getattr(transformers, f"AutoModelFor{name}").from_pretrained(folder / name).eval()
        wanted, found = theirs(**batch).logits, model(**batch).logits
        same([found[real]] if name == "MaskedLM" else [found], [wanted[real]] if name == "MaskedLM" else [wanted])


def in_place(folder: Path) -> None:
    """`pack_in_place` on a model of transformers: logits of real tokens, loss and gradients."""
    from transformers import AutoModelForMaskedLM

    batch, real = padded()
    labels = batch["input_ids"].masked_fill(~real, -100)
    MaskedLM(encoder()).save_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="sdpa").eval()

    def step() -> list[Tensor]:
        model.zero_grad()
        output = model(**batch, labels=labels)
        output.loss.backward()
        return [output.loss, output.logits[real], *(x.grad.clone() for x in model.parameters() if x.grad is not None)]

    wanted = step()
    pack_in_place(model)
    same(step(), wanted)


def sentence_transformers(folder: Path) -> None:
    """`Embedder` and `Reranker` in sentence-transformers, as they are and packed in place."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    embedder = Embedder(encoder(), tokenizer()).eval()
    embedder.save_pretrained(folder / "embedder")
    model = SentenceTransformer(str(folder / "embedder"), device="cpu")
    same([model.encode(TEXTS), pack_in_place(model).encode(TEXTS)], [embedder.encode(TEXTS)] * 2)
    reranker = Reranker(SequenceClassifier(encoder(), labels=1), tokenizer()).eval()
    reranker.save_pretrained(folder / "reranker")
    pairs, model = [(TEXTS[0], text) for text in TEXTS], CrossEncoder(str(folder / "reranker"), device="cpu")
    same([model.predict(pairs), pack_in_place(model).predict(pairs)], [reranker.score(TEXTS[0], TEXTS)] * 2)


def multi_vector(folder: Path) -> None:
    """`ColBERT` in the `MultiVectorEncoder` of sentence-transformers 6."""
    from sentence_transformers import MultiVectorEncoder

    colbert = ColBERT.default()
    colbert.save_pretrained(folder)
    model = MultiVectorEncoder(str(folder), device="cpu")
    for each in (model, pack_in_place(model)):
        same(each.encode_document(TEXTS), colbert.encode_documents(TEXTS))


def pylate(folder: Path) -> None:
    """`ColBERT` in PyLate."""
    from pylate import models

    colbert = ColBERT.default()
    colbert.save_pretrained(folder)
    model = models.ColBERT(str(folder), device="cpu")
    for each in (model, pack_in_place(model)):
        same(each.encode(TEXTS, is_query=False), colbert.encode_documents(TEXTS))


def backend(folder: Path, kind: str) -> None:
    from sentence_transformers import SentenceTransformer

    from modernbert.integrations.onnx import export

    embedder = Embedder(encoder(), tokenizer()).eval()
    export(embedder, folder, kind=kind)
    # Left alone, OpenVINO computes in bfloat16 where the processor multiplies it faster.
    float32 = {
        "onnx": {"provider": "CPUExecutionProvider"},
        "openvino": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
    }
    model = SentenceTransformer(str(folder), backend=kind, model_kwargs=float32[kind], device="cpu")
    same([model.encode(TEXTS)], [embedder.encode(TEXTS)])


def onnx_backend(folder: Path) -> None:
    """An exported `Embedder` in `SentenceTransformer(backend="onnx")`."""
    import optimum.onnxruntime  # noqa: F401  (sentence-transformers raises a plain Exception without it)

    backend(folder, "onnx")


def openvino_backend(folder: Path) -> None:
    """An exported `Embedder` in `SentenceTransformer(backend="openvino")`."""
    import optimum.intel.openvino  # noqa: F401

    backend(folder, "openvino")


CHECKS: dict[str, Callable[[Path], None]] = {
    "checkpoints": checkpoints,
    "heads": heads,
    "in place": in_place,
    "sentence-transformers": sentence_transformers,
    "multi-vector": multi_vector,
    "PyLate": pylate,
    "ONNX backend": onnx_backend,
    "OpenVINO backend": openvino_backend,
}


def check(names: Iterable[str]) -> dict[str, Any]:
    """The versions of this environment, and of each check "yes", "absent" if a package or class is, or what failed."""
    versions, results = {"python": sys.version.split()[0]}, {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                CHECKS[name](Path(folder))
                results[name] = "yes"
            except ImportError as error:
                # A package that is there but cannot be loaded is not named: transformers hides it.
                results[name] = "absent" if error.name else failure(error)
            except Exception as error:  # whatever the other library raises is the result
                results[name] = failure(error)
    return {"versions": versions, "results": results}


def failure(error: Exception) -> str:
    return f"no: {type(error).__name__}: {error}".splitlines()[0][:200]


def run(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        python = folder / name / "bin" / "python"
        if not python.exists():
            venv.create(folder / name, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--editable", ROOT, *ENVIRONMENTS[name]]
        subprocess.run(pip, check=True)
        found = subprocess.run([python, __file__, "check"], check=True, capture_output=True, text=True)
        enter({"environment": name, **json.loads(found.stdout.splitlines()[-1])})


def enter(row: dict[str, Any]) -> None:
    """Replace the line of this environment, in the order of `ENVIRONMENTS`."""
    rows = {one["environment"]: one for one in [*read(), row]}
    ordered = [rows[name] for name in ENVIRONMENTS if name in rows]
    ROWS.write_text("".join(f"{json.dumps(one)}\n" for one in ordered), encoding="utf-8")


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()] if ROWS.exists() else []


def table(rows: Iterable[dict[str, Any]]) -> str:
    """A line for each environment, and what failed below."""
    cells, failed = [["versions", *CHECKS], ["---"] * (1 + len(CHECKS))], []
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "python")
        results = [row["results"].get(name, "absent") for name in CHECKS]
        cells.append([versions, *({"yes": "yes", "absent": "–"}.get(result, "no") for result in results)])
        reasons = [f"{name}: {of}" for name, of in zip(CHECKS, results, strict=True) if of.startswith("no")]
        failed += [f"- {versions}: {reason}" for reason in reasons]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([*lines, *(["", *failed] if failed else [])]) + "\n"


def write() -> None:
    page = PAGE.read_text("utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table(read()) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:] or ["help"]
    if command == "check":
        print(json.dumps(check(arguments or CHECKS)))
    elif command == "run" and arguments:
        run(Path(arguments[0]).resolve(), arguments[1:] or ENVIRONMENTS)
        write()
    elif command == "table":
        write()
    else:
        sys.exit(__doc__)
