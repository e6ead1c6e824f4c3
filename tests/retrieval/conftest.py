"""The model of the tests of stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stores import small_colbert

from modernbert import ColBERT


@pytest.fixture(scope="module")
def colbert(modernbert_tokenizer_file: Path) -> ColBERT:
    torch.manual_seed(0)
    return small_colbert(modernbert_tokenizer_file.parent)
