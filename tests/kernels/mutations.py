"""Ways to break each kernel that must make a test fail: a mask, a sign, a scale.

    python tests/kernels/mutations.py            try all of them, and fail if the tests pass with one
    python tests/kernels/mutations.py geglu      those of one file

Each row is applied to a copy of the sources, and the tests that it names are run there in Triton's interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """In `file` of `fused/`, write `new` for `old`; one of the tests that `selection` (of pytest) names must fail."""

    file: str
    old: str
    new: str
    selection: str


ROWS = "tests/kernels/test_rows.py -k"
CROSS = "tests/kernels/test_linear_cross_entropy.py -k"
ATTENTION = "tests/kernels/test_attention.py -k"
EDGES = f"{ATTENTION} edges"
MAXSIM = "tests/kernels/test_maxsim.py -k"
POOL = "tests/kernels/test_pool.py -k"
PROJECT = "tests/kernels/test_project_normalize.py -k"
TABLE = "tests/kernels/test_rotary_table.py"
MUTATIONS = [
    Mutation("attention_kernels.py", "columns[None, :] < high[:, None]", "columns[None, :] <= high[:, None]", EDGES),
    Mutation("attention_kernels.py", "columns[None, :] >= low[:, None]", "columns[None, :] > low[:, None]", EDGES),
    Mutation("attention_kernels.py", "_between(queries, low, high)", "_between(queries, low, high + 1)", EDGES),
    Mutation("attention_kernels.py", "start_n + BLOCK_N > all_stop", "start_n > all_stop", EDGES),
    Mutation("attention_kernels.py", "start_n < all_start", "start_n < start", EDGES),
    Mutation("attention_kernels.py", "(b * c + a * s).to(dtype)", "(b * c - a * s).to(dtype)", EDGES),
    Mutation("attention_kernels.py", "b * c - a * s, mask=row_mask)", "b * c + a * s, mask=row_mask)", EDGES),
    Mutation("attention_kernels.py", "scale = scale * LN_2\n    _store", "_store", EDGES),
    Mutation("attention_kernels.py", "(dp - delta_i[:, None])", "dp", EDGES),
    Mutation("attention_kernels.py", "alpha = tl.exp2(m_i - m_new)", "alpha = 1.0", EDGES),
    Mutation("attention_kernels.py", "other=0), high, 0)", "other=0), high, high)", f"{ATTENTION} queries_only"),
    Mutation("attention_kernels.py", "        ends = key_ends", "        ends = ends", f"{ATTENTION} queries_only"),
    Mutation("token_ranges.py", "other=T) <= tokens", "other=T) < tokens", f"{ATTENTION} token_ranges"),
    Mutation("token_ranges.py", "middle + 1, segment)", "middle, segment)", f"{ATTENTION} token_ranges"),
    Mutation("token_ranges.py", "tl.minimum(begin + tl.maximum(keys, 0), end)", "end", f"{ATTENTION} token_ranges"),
    Mutation(
        "token_ranges.py", "tl.minimum(tl.maximum(end, begin), total), total)", "end, total)", f"{ATTENTION} reads_only"
    ),
    Mutation("geglu.py", "(rows < T)", "(rows < T - 1)", f"{ROWS} geglu"),
    Mutation("geglu.py", "sigmoid * (1 + a * (1 - sigmoid))", "sigmoid * (1 - a * (1 - sigmoid))", f"{ROWS} silu"),
    Mutation("geglu.py", "(-0.5 * LOG2_E)", "-LOG2_E", f"{ROWS} geglu"),
    Mutation("geglu.py", "0.7107068705", "0.7507068705", f"{ROWS} geglu"),
    Mutation("geglu.py", "tl.where(a < 0, tail, 1 - tail)", "1 - tail", f"{ROWS} geglu"),
    Mutation(
        "layer_norm_kernels.py", "tl.where(mask, values - mean[:, None], 0.0)", "values - mean[:, None]", f"{ROWS} norm"
    ),
    Mutation("layer_norm_kernels.py", "axis=1) / D + eps", "axis=1) / COLUMNS + eps", f"{ROWS} norm"),
    Mutation("layer_norm_kernels.py", "values += tl.load(delta", "values -= tl.load(delta", f"{ROWS} add_layer_norm"),
    Mutation(
        "layer_norm_kernels.py", "grad - mean_g[:, None] - x_hat", "grad - mean_g[:, None] + x_hat", f"{ROWS} norm"
    ),
    Mutation("layer_norm_kernels.py", "tl.sum(grad, axis=1) / D", "tl.sum(grad, axis=1) / COLUMNS", f"{ROWS} norm"),
    Mutation("layer_norm_kernels.py", "grad += tl.load(ds", "grad -= tl.load(ds", f"{ROWS} add_layer_norm"),
    Mutation("layer_norm_kernels.py", "tl.num_programs(0), num", "2 * tl.num_programs(0), num", f"{ROWS} walk"),
    Mutation(
        "layer_norm_kernels.py",
        "dy + offsets, mask=mask, other=0.0",
        "dy + offsets, mask=mask, other=1.0",
        f"{ROWS} bias",
    ),
    Mutation("layer_norm_kernels.py", "tl.load(ids + rows", "tl.load(ids + rows * 0", f"{ROWS} embed_layer_norm"),
    Mutation("rotary.py", "a.to(tl.float32) * c - b", "a.to(tl.float32) * c + b", "tests/kernels/test_rotary.py"),
    Mutation("rotary.py", "if INVERSE:", "if not INVERSE:", "tests/kernels/test_rotary.py"),
    Mutation("rotary.py", "mask & (head < 2 * HEADS)", "mask & (head < HEADS)", "tests/kernels/test_rotary.py"),
    Mutation(
        "rotary.py",
        "tl.store(dqkv + target, a * c + b * s",
        "tl.store(dqkv + target, a * c - b * s",
        "tests/kernels/test_rotary.py",
    ),
    Mutation("rotary_table.py", "(quarter == 1) | (quarter == 2)", "(quarter == 1) | (quarter == 3)", TABLE),
    Mutation("rotary_table.py", "quarter >= 2, -result", "quarter >= 3, -result", TABLE),
    Mutation("rotary_table.py", "1.0 - 0.5 * square", "1.0 - square", TABLE),
    Mutation(
        "rotary_table.py",
        "tl.exp2(columns.to(tl.float64) * _float64(STEP)).to(tl.float32)",
        "tl.exp2(columns.to(tl.float32) * STEP)",
        f"{TABLE} -k last_bits",
    ),
    Mutation(
        "rotary_table.py",
        "(position.to(tl.float32)[:, None] * frequency).to(tl.float64)",
        "position.to(tl.float64)[:, None] * frequency",
        f"{TABLE} -k last_bits",
    ),
    Mutation("rotary_table.py", "_float64(TWO_OVER_PI) + 0.5", "_float64(TWO_OVER_PI)", f"{TABLE} -k last_bits"),
    Mutation("linear_cross_entropy.py", 'tl.where(start + columns < V, x, float("-inf"))', "x", f"{CROSS} backend"),
    Mutation("linear_cross_entropy.py", "slope - tl.where(", "slope + tl.where(", f"{CROSS} backend"),
    Mutation("linear_cross_entropy.py", "1 + 2 * z_loss * lse", "1 + z_loss * lse", f"{CROSS} backend"),
    Mutation(
        "linear_cross_entropy.py", "lse - target_logit + z_loss", "lse - target_logit - z_loss", f"{CROSS} backend"
    ),
    Mutation("linear_cross_entropy.py", "(x - lse) * LOG2_E", "(x - lse)", f"{CROSS} backend"),
    Mutation("linear_cross_entropy.py", "(m_i - m_new) * LOG2_E", "(m_i - m_new)", f"{CROSS} backend"),
    Mutation("linear_cross_entropy.py", "m_i = LOWEST", 'm_i = float("-inf")', f"{CROSS} excluded"),
    Mutation("linear_cross_entropy.py", 'other=float("nan")', "other=0.0", f"{CROSS} not_a_class"),
    Mutation(
        "linear_cross_entropy.py",
        "value * tl.load(scale), mask=offsets < N",
        "value, mask=offsets < N",
        f"{CROSS} backend",
    ),
    Mutation(
        "linear_cross_entropy.py",
        "tl.load(scale), mask=offsets < N",
        "tl.load(scale), mask=offsets < N - 1",
        f"{CROSS} backend",
    ),
    Mutation("linear_cross_entropy.py", "dbias_V +=", "dbias_V -=", f"{CROSS} backend"),
    Mutation("linear_cross_entropy.py", "1 - smoothing, 0.0)", "1.0, 0.0)", f"{CROSS} smoothing"),
    Mutation("linear_cross_entropy.py", "gradient -= smoothing / V", "gradient -= 0", f"{CROSS} smoothing"),
    Mutation("linear_cross_entropy.py", "smoothing / V * total", "smoothing * total", f"{CROSS} smoothing"),
    Mutation("linear_cross_entropy.py", "V, x, 0.0), axis=0)", "V, x, 1.0), axis=0)", f"{CROSS} smoothing"),
    Mutation("linear_cross_entropy.py", "gradient * scale, mask", "gradient, mask", f"{CROSS} smoothing"),
    Mutation("maxsim_kernels.py", 'similarity, float("-inf"))', "similarity, 0.0)", f"{MAXSIM} negative"),
    Mutation("maxsim_kernels.py", "tl.where(top > best", "tl.where(top >= best", f"{MAXSIM} ties"),
    Mutation("maxsim_kernels.py", "mask=is_last & begins_here)", "mask=is_last)", f"{MAXSIM} any_length"),
    Mutation("maxsim_kernels.py", "tl.range(first + 1, last + 1)", "tl.range(first + 1, last)", f"{MAXSIM} any_length"),
    Mutation("maxsim_kernels.py", "a_segment == b_segment", "a_segment != b_segment", f"{MAXSIM} any_length"),
    Mutation(
        "maxsim_kernels.py", "rows < end_row\n        q =", "rows < end_row - 1\n        q =", f"{MAXSIM} diagonal"
    ),
    Mutation("maxsim_kernels.py", "total += weight[:, None] * d", "total -= weight[:, None] * d", f"{MAXSIM} diagonal"),
    Mutation("maxsim_kernels.py", "has_grad = inside & (weight != 0)", "has_grad = inside", f"{MAXSIM} leaves_out"),
    Mutation("maxsim_kernels.py", "has_grad = row_mask & (weight != 0)", "has_grad = row_mask", f"{MAXSIM} leaves_out"),
    Mutation("maxsim_kernels.py", "total += peak * tl.dot", "total += tl.dot", f"{MAXSIM} again"),
    Mutation(
        "maxsim_kernels.py",
        "        if ADD:\n            total +=",
        "        if ADD:\n            total -=",
        f"{MAXSIM} again",
    ),
    Mutation("maxsim_kernels.py", "== (tokens - start)", "<= (tokens - start)", f"{MAXSIM} diagonal"),
    Mutation("pool.py", 'mask=mask, other=float("-inf")', "mask=mask, other=0", f"{POOL} backend"),
    Mutation("pool.py", "tl.where(top > best", "tl.where(top >= best", f"{POOL} ties"),
    Mutation("pool.py", "tl.maximum(end - start, 1)", "tl.maximum(end - start, 2)", f"{POOL} backend"),
    Mutation("pool.py", "(rows == end - 1)", "(rows == end)", f"{POOL} backend"),
    Mutation("pool.py", "share / length[:, None]", "share", f"{POOL} backend"),
    Mutation(
        "project_normalize.py", "tl.maximum(norm, MIN_NORM)[:, None], mask", "norm[:, None], mask", f"{PROJECT} shorter"
    ),
    Mutation("project_normalize.py", "grad - y * along[:, None]", "grad + y * along[:, None]", f"{PROJECT} backend"),
    Mutation(
        "project_normalize.py",
        "tl.where(norm > MIN_NORM, tl.sum(grad * y, axis=1), 0.0)",
        "tl.sum(grad * y, axis=1)",
        f"{PROJECT} shorter",
    ),
    Mutation("project_normalize.py", "if SELECT else rows", "if False else rows", f"{PROJECT} chosen"),
]


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass although the kernel is broken."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kernels", "modernbert", "tests", "benchmarks", "pyproject.toml"):
            source, target = ROOT / name, Path(folder, name)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        file = Path(folder, "kernels", "modernbert_kernels", "fused", mutation.file)
        text = file.read_text()
        if text.count(mutation.old) == 0:
            raise ValueError(f"{mutation.file} no longer holds {mutation.old!r}: write the mutation anew")
        file.write_text(text.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "interpreter", "-p", "no:cacheprovider"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        selection = mutation.selection.split()
        done = subprocess.run([*command, *selection], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest could not run {mutation.selection}:\n{done.stdout}{done.stderr}")
        return done.returncode == 0


def main(files: list[str]) -> int:
    chosen = [one for one in MUTATIONS if not files or one.file.removesuffix(".py") in files]
    unnoticed = 0
    for mutation in chosen:
        alive = survives(mutation)
        unnoticed += alive
        print(
            f"{'UNNOTICED' if alive else 'noticed'}  {mutation.file}: {mutation.old!r} -> {mutation.new!r}", flush=True
        )
    print(f"{len(chosen) - unnoticed} of {len(chosen)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
