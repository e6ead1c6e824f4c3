"""The operations and bytes of a model are counted right: against torch's own counter and the published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.clock import Rates
from benchmarks.work import flops, kernels, least_seconds, reached
from modernbert import Encoder
from modernbert.config import PRESETS, EncoderConfig
from modernbert.packing import pack
from modernbert_kernels import backend

SMALL = EncoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, local_attention=8
)


def counted(config: EncoderConfig, lengths: list[int], *, backward: bool) -> int:
    """What torch counts in a pass of the specification."""
    encoder = Encoder.from_config(config)
    batch = pack([[1] * length for length in lengths])
    with backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out_TD = encoder(batch)
        if backward:
            out_TD.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("lengths", [[7], [16, 16, 16]])
def test_a_model_without_windows_has_the_operations_that_torch_counts(lengths: list[int]) -> None:
    config = replace(SMALL, layer_pattern=("full_attention",))
    assert flops(config, lengths) == counted(config, lengths, backward=False)


def test_backward_every_linear_layer_counts_three_times_and_attention_three_and_a_half() -> None:
    config, length = replace(SMALL, layer_pattern=("full_attention",)), 16
    attention = config.num_hidden_layers * 4 * length**2 * config.hidden_size
    products = flops(config, [length]) - attention
    assert flops(config, [length], backward=True) == 3 * products + 7 * attention // 2
    # Torch keeps the probabilities, so its attention counts three times.
    assert counted(config, [length], backward=True) == 3 * (products + attention)


@pytest.mark.parametrize("length", [1, 3, 5, 6, 40])
def test_a_window_counts_the_pairs_that_see_each_other(length: int) -> None:
    config = replace(SMALL, num_hidden_layers=1, layer_pattern=("sliding_attention",))
    place = torch.arange(length)
    pairs = int(((place[:, None] - place).abs() <= config.window).sum())
    D, F = config.hidden_size, config.intermediate_size
    assert flops(config, [length]) == 2 * length * (4 * D * D + 3 * D * F) + 4 * D * pairs


@pytest.mark.parametrize(
    ("name", "length", "millions"),
    [
        ("ettin-17m", 512, 9.9), ("ettin-32m", 512, 29.4), ("ettin-68m", 512, 95.2), ("modernbert-base", 512, 238.7),
        ("modernbert-large", 512, 716.8), ("ettin-1b", 512, 1929), ("ettin-17m", 8192, 33.5),
        ("modernbert-base", 8192, 427.5), ("modernbert-large", 8192, 1031), ("ettin-1b", 8192, 2479),
    ],
)  # fmt: skip
def test_presets_have_the_published_operations_per_token(name: str, length: int, millions: float) -> None:
    """Published with 129 keys for every local query; those near an end of their text see fewer."""
    config = PRESETS[name]
    local = sum(not config.is_global(layer) for layer in range(config.num_hidden_layers))
    hidden = local * 4 * config.hidden_size * config.window * (config.window + 1) / length
    assert flops(config, [length] * 2) / (2 * length) + hidden == pytest.approx(millions * 1e6, rel=0.005)
    assert hidden < 0.01 * millions * 1e6


def test_a_forward_pass_has_the_kernels_of_the_encoder() -> None:
    names = [kernel.name for kernel in kernels(PRESETS["modernbert-base"], [512], 2)]
    # Eight a layer, the first without a norm; one before them, one after; the ranges, a table for each of two thetas.
    assert len(names) == 8 * 22 - 1 + 1 + 1 + 1 + 2
    assert [names.count(name) for name in ("Wqkv", "Wi", "attention Wo, added", "MLP Wo, added")] == [22, 22, 21, 22]
    assert [names.count(name) for name in ("layer_norm", "add_layer_norm", "attention Wo")] == [43, 1, 1]
    assert names.count("global attention") == 8
    assert names.count("local attention") == 14
    assert names.count("rotary_table") == 2
    assert [kernel.name for kernel in kernels(PRESETS["ettin-17m"], [512], 2)].count("rotary_table") == 1


def test_a_step_has_both_passes_of_every_kernel() -> None:
    config, lengths = PRESETS["ettin-17m"], [512] * 2
    each = list(kernels(config, lengths, 2, training=True))
    forward, backward = ([one.name for one in each if one.backward is which] for which in (False, True))
    assert [name for name in forward if name not in ("token_ranges", "rotary_table")] == backward
    assert sum(one.flops for one in each) == flops(config, lengths, backward=True)
    norm = next(one for one in each if one.name == "add_layer_norm" and not one.backward)
    assert norm.bytes == 1024 * 256 * (4 + 2 + 4 + 2), "the stream in float32, twice; an increment and the norm"


def test_the_roofline_is_the_longer_of_operations_and_bytes_of_every_kernel() -> None:
    config, lengths = PRESETS["ettin-17m"], [512] * 4
    T, D, F, L = 2048, 256, 384, 7
    weights = L * (4 * D * D + 3 * D * F)
    # What a layer reads and writes: four products of which two read the stream too, attention, two norms, geglu.
    layer = (4 + 3 + 1 + 2) * D + 3 * F + 4 * D + 2 * 2 * D + 3 * F
    # The first layer has no first norm, but its second adds, and one product does not; two at the ends.
    bytes_moved = 2 * (weights + T * (L * layer + (-2 + 2 - 1 + 2 + 2) * D)) + (2 * 8 + 12) * T + (L + 1) * T * 64 * 4
    assert least_seconds(config, lengths, 2, 1e30, 1e9) == pytest.approx(bytes_moved / 1e9)
    assert least_seconds(config, lengths, 2, 1e9, 1e30) == pytest.approx(flops(config, lengths) / 1e9)
    both = least_seconds(config, lengths, 2, 1e11, 1e9)
    assert max(flops(config, lengths) / 1e11, bytes_moved / 1e9) <= both
    assert both < flops(config, lengths) / 1e11 + bytes_moved / 1e9


def test_a_kernel_has_its_share_of_the_roof_that_it_meets() -> None:
    rates = Rates(copy=1e12, matmul=1e14)
    for flops_, moved, percent in ((0, 10**9, 50.0), (2 * 10**11, 10**9, 100.0)):
        assert reached(2e-3, rates, flops_, moved)["percent_of_roofline"] == percent
    assert reached(2e-3, rates, 10**11)["percent_of_roofline"] is None
