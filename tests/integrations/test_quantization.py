"""torch.ao.quantization looks for layers by their exact type: it is refused by name, or finds all of a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hf_twin import TINY, pad, random_ids, twins
from torch import nn
from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

from modernbert import ColBERT, pack
from modernbert.integrations.quantization import plain_linears
from modernbert.modules import Linear

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="PyTorch without a quantized engine"),
]
BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"


@pytest.mark.parametrize("layers", [{nn.Linear}, None, {nn.Linear: default_dynamic_qconfig}, {Linear}])
def test_it_is_refused_where_it_would_leave_a_model_as_it_was(layers: object) -> None:
    """It found no layer, and returned the model in float32 without a warning."""
    encoder = twins(TINY)[1]
    with pytest.raises(TypeError, match="plain_linears"):
        quantize_dynamic(encoder, layers, dtype=torch.qint8)
    encoder(torch.tensor([[5, 6]]))
    copy.deepcopy(encoder)


def test_it_finds_every_layer_of_a_copy() -> None:
    encoder = twins(TINY)[1]
    before = [type(module) for module in encoder.modules()]
    plain = plain_linears(encoder)
    assert plain.layers[0].mlp.Wi.weight is encoder.layers[0].mlp.Wi.weight
    small = quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert sum(isinstance(x, torch.ao.nn.quantized.dynamic.Linear) for x in small.modules()) == 4 * 4
    assert [type(module) for module in encoder.modules()] == before
    ids, mask = pad(random_ids([3, 40, 17], 100), "left")
    with torch.no_grad():
        wanted, exact, got = encoder(ids, mask)[0], plain(ids, mask)[0], small(ids, mask)[0]
        packed = small(pack(ids, mask))
    torch.testing.assert_close(exact, wanted, rtol=0, atol=2e-5)
    cosine = torch.cosine_similarity(got[mask == 1], wanted[mask == 1], dim=-1)
    assert cosine.min() > 0.95
    torch.testing.assert_close(packed, got[mask == 1], rtol=0, atol=1e-5)


def test_a_quantized_colbert_encodes() -> None:
    from modernbert import Encoder, Tokenizer

    tokenizer = Tokenizer.from_pretrained(BACKBONE)
    colbert = ColBERT.from_encoder(Encoder.from_pretrained(BACKBONE), tokenizer, dim=24).eval()
    small = quantize_dynamic(plain_linears(colbert), {nn.Linear}, dtype=torch.qint8)
    got, wanted = small.encode_queries(["to fold a tensor"]), colbert.encode_queries(["to fold a tensor"])
    assert torch.cosine_similarity(got.values, wanted.values, dim=-1).min() > 0.95
