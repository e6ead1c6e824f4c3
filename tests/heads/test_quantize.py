"""quantize is sentence-transformers' quantize_embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.quantization import quantize_embeddings

from modernbert import Embedder, Encoder, Tokenizer
from modernbert.heads.quantize import DTYPES, Precision, quantize, ranges_of

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
PRECISIONS: list[Precision] = ["int8", "uint8", "binary", "ubinary"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [1, 7, 8, 64, 100])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_numbers_are_theirs(precision: Precision, width: int, count: int) -> None:
    torch.manual_seed(width)
    calibration, vectors = torch.randn(200, width), torch.randn(count, width)
    vectors[:, 0] = 0.0  # not above 0, and a place whose range is one number
    calibration[:, 0] = 0.0
    ranges = ranges_of(calibration)
    wanted = quantize_embeddings(vectors.numpy(), precision, ranges=ranges.numpy())
    got = quantize(vectors, precision, ranges if "int8" in precision else None)
    assert got.dtype == DTYPES[precision]
    assert np.array_equal(got.numpy(), wanted)
    by_calibration = quantize_embeddings(vectors.numpy(), precision, calibration_embeddings=calibration.numpy())
    assert np.array_equal(got.numpy(), by_calibration)


def test_numbers_outside_of_the_ranges_are_at_their_ends() -> None:
    ranges = torch.tensor([[0.0, 0.0], [255.0, 0.0]])
    got = quantize(torch.tensor([[-9.0, -9.0], [999.0, 9.0], [0.0, 0.0], [255.0, 300.0]]), "uint8", ranges)
    assert got.tolist() == [[0, 0], [255, 9], [0, 0], [255, 255]]
    assert quantize(torch.tensor([[1.0, -1, 0, 1, -1, -1, -1, -1, 2]]), "ubinary").tolist() == [
        [0b10010000, 0b10000000]
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_embedder_gives_what_their_encode_gives(precision: Precision, tmp_path: Path) -> None:
    """Levels may differ by one where a float is at the edge of two."""
    torch.manual_seed(0)
    model = Embedder(Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)).eval()
    model.save_pretrained(tmp_path)
    texts = [f"text {place} of the calibration" * (1 + place % 3) for place in range(40)]
    wanted = SentenceTransformer(str(tmp_path), device="cpu").encode(texts, precision=precision, batch_size=64)
    ranges = ranges_of(model.encode(texts)) if "int8" in precision else None
    got = model.encode(texts, precision=precision, ranges=ranges)
    assert (got.dtype, got.shape) == (DTYPES[precision], wanted.shape)
    if "int8" in precision:
        apart = (got.to(torch.int16) - torch.from_numpy(wanted).to(torch.int16)).abs()
        assert apart.max() <= 1
        assert (apart == 0).float().mean() > 0.98
    else:
        assert np.array_equal(got.numpy(), wanted)
    with pytest.raises(ValueError, match="precision is 'int4'"):
        model.encode(iter(texts), precision="int4")  # pyright: ignore[reportArgumentType]


def test_wrong_arguments() -> None:
    vectors = torch.randn(3, 8)
    for call, words in (
        (lambda: quantize(vectors, "int4"), "precision is 'int4', but must be one of int8, uint8, binary"),
        (lambda: quantize(vectors, "int8"), r"int8 needs ranges \[2, 8\], as of ranges_of.*, got none"),
        (lambda: quantize(vectors, "uint8", ranges_of(torch.randn(3, 7))), r"got shape \(2, 7\)"),
        (
            lambda: quantize(vectors[0], "binary"),
            r"vectors must be floats \[N, E\], got torch\.float32 of shape \(8,\)",
        ),
        (lambda: quantize(vectors.to(torch.int8), "binary"), "vectors must be floats"),
        (lambda: ranges_of(vectors[:0]), r"at least one, got shape \(0, 8\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
