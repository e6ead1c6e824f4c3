"""What all tests share: one thread, one seed, the real ModernBERT tokenizer, the gpu and browser marks."""

from __future__ import annotations

import gc
import gzip
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401  (makes bfloat16 right in Triton's interpreter)

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "compile the Triton kernels for every kind of GPU, not for one"
    parser.addoption("--all-architectures", action="store_true", help=text)
    parser.addoption("--sweep", action="store_true", help="measure time and memory over many inputs: minutes")
    text = "write the table of what the Triton kernels take of a GPU (with --all-architectures)"
    parser.addoption("--update-resources", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "browser: needs a browser")
    config.addinivalue_line("markers", "sweep: runs with --sweep only, as in make check, because it takes long")
    config.addinivalue_line("markers", "interpreter: runs Triton's kernels on the CPU; with TRITON_INTERPRET=1 only")
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    forget_garbage()


@pytest.fixture(autouse=True, scope="module")
def _forget_garbage() -> Iterator[None]:
    yield
    forget_garbage()


def forget_garbage() -> None:
    """Collect garbage now, and never look at what is left again: millions of objects, of which most are modules and
    compiled graphs, make every full collection take a second.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("sweep") and not config.getoption("--sweep"):
            item.add_marker(pytest.mark.skip(reason="takes long: make check, or pytest --sweep"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU (most of these also run in Triton's interpreter)"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def modernbert_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real tokenizer.json of ModernBERT and Ettin, unpacked beside its tokenizer_config.json."""
    source, folder = FIXTURES / "tokenizer", tmp_path_factory.mktemp("modernbert-tokenizer")
    with gzip.open(source / "tokenizer.json.gz") as packed, (folder / "tokenizer.json").open("wb") as file:
        shutil.copyfileobj(packed, file)
    shutil.copy(source / "tokenizer_config.json", folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def model(modernbert_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small untrained ColBERT."""
    from stores import small_colbert  # which imports the whole library

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("colbert") / "model"
    small_colbert(modernbert_tokenizer_file.parent).save_pretrained(folder)
    return str(folder)
