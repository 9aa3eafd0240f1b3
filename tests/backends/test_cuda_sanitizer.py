"""Every decode and prefill kernel under compute-sanitizer, on weights a little larger than a tile: no access outside, no race."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cuda_products import nvcc
from sanitizer import run_clean

from sparse_engine.backends import cuda_row_stream
from sparse_engine.backends.cuda_nm_8bit import TILES, TO_LEVELS

PRODUCTS = """
import ast, sys

import torch
from products import expected_product, relative_error
from sparse_engine import registry
from sparse_engine.backends import cuda_row_stream
from sparse_engine.backends.cuda_decode import gpu
from sparse_engine.backends.cuda_tiles import parse, unstructured_parts
from sparse_engine.bench.shapes import random_packed
from sparse_engine.pattern import SparsityPattern

file, patterns, tiles = sys.argv[1], sys.argv[2].split(","), ast.literal_eval(sys.argv[3])
for pattern in patterns:
    kernel = registry.get("cuda_unstructured" if pattern == "unstructured" else "cuda_nm")
    parsed = SparsityPattern.parse("0.5" if pattern == "unstructured" else pattern)
    # The last row tile is not full, nor the last unit where the kernel takes such; unstructured weights of few columns have units of 128.
    for rows, columns in ((200, 1288), (72, 520)):
        if file == cuda_row_stream.SOURCE:
            columns = -(-columns // 256) * 256
        # Torch's own kernels, seen by the tool as well, would take most of the time: all but the products is made on the processor.
        packed = random_packed((rows, columns), parsed, torch.bfloat16, "cpu")
        layout = {name: tensor.cuda() for name, tensor in kernel.prepare(packed).items()}
        bias = torch.randn(rows, dtype=torch.bfloat16)
        for m, *tile in tiles:
            if file == cuda_row_stream.SOURCE:
                assert cuda_row_stream.parse_row(pattern, (file, *tile), columns, m, gpu(0)), tile
            else:
                if pattern == "unstructured":
                    tile[4] = unstructured_parts(columns)
                assert parse(pattern, (file, *tile)), tile
            x = torch.randn(m, columns, dtype=torch.bfloat16)
            y = kernel.run_config(x.cuda(), layout, bias.cuda(), parsed, (file, *tile))
            assert relative_error(y.cpu(), expected_product(x, packed, bias)) < 1e-2, (rows, m, tile)
torch.cuda.synchronize()
print("clean:", len(patterns) * len(tiles))
"""

# Activation rows, then the fields of a configuration.
_MMA = [
    *((1, 1, 1, 1, 4, 1, 1, 2, 2, 16, 1), (5, 1, 1, 2, 2, 1, 2, 2, 2, 16, 1), (16, 2, 1, 2, 2, 1, 1, 2, 2, 8, 1)),
    (33, 8, 1, 2, 4, 1, 2, 2, 1, 8, 1),
]
_SHARED_UNITS = [(1, 1, 1, 1, 4, 4, 1, 2, 2, 16, 1), (7, 1, 2, 2, 4, 2, 1, 2, 1, 16, 1)]
CASES = [
    ("decode_nm.cu", "2:4,4:8", [*_MMA, *_SHARED_UNITS]),
    ("decode_unstructured.cu", "unstructured", _MMA),
    (
        "decode_row_stream.cu",
        "unstructured",
        [(1, 8, 2, 8, 1, 4, 1), (5, 3, 1, 4, 3, 2, 1), (1, 6, 2, 4, 1, 4, 2), (7, 1, 2, 4, 1, 4, 2), (13, 2, 1, 4, 1, 2, 1)],
    ),
    (
        "decode_row_stream.cu",
        "2:4,4:8",
        [(1, 8, 2, 1, 1, 4, 1), (5, 12, 1, 4, 1, 4, 1), (1, 6, 2, 2, 1, 4, 2), (7, 1, 2, 2, 1, 4, 2), (13, 2, 1, 2, 1, 2, 1)],
    ),
    *(
        (
            "decode_wgmma.cu",
            patterns,
            [(5, 1, 1, 4, 2, 1, 2, 2, 1, 4, 1), (33, 8, 1, 8, 1, 1, 1, 2, 1, 8, 1), (128, 16, 1, 4, 1, 1, 2, 2, 1, 4, 1)],
        )
        for patterns in ("2:4,4:8", "unstructured")
    ),
    *(
        (
            "decode_stream.cu",
            patterns,
            [(5, 1, 1, 4, 1, 1, 0, 2, 1, 16, 2), (33, 8, 1, 8, 1, 1, 3, 2, 1, 8, 1), (128, 16, 1, 4, 1, 1, 0, 2, 1, 8, 1)],
        )
        for patterns in ("2:4,4:8", "unstructured")
    ),
]


PREFILL = """
import sys

import torch
from products import expected_product, relative_error
from sparse_engine import registry
from sparse_engine.backends import cuda_prefill
from sparse_engine.bench.shapes import random_packed
from sparse_engine.pattern import SparsityPattern

name, pattern = sys.argv[1:]
kernel = registry.get("cuda_unstructured" if pattern == "unstructured" else "cuda_nm")
parsed = SparsityPattern.parse("0.5" if pattern == "unstructured" else pattern)
here = cuda_prefill.gpu(torch.cuda.current_device())
ran = 0
# Rows, columns and activation rows that fill no tile.
for rows, columns, m in ((200, 1288, 300), (72, 520, 150)):
    packed = random_packed((rows, columns), parsed, torch.bfloat16, "cpu")
    layout = {name: tensor.cuda() for name, tensor in kernel.prepare(packed).items()}
    bias, x = torch.randn(rows, dtype=torch.bfloat16), torch.randn(m, columns, dtype=torch.bfloat16)
    expected = expected_product(x, packed, bias)
    for form, configs in cuda_prefill.offered(pattern, rows, columns, m, here):
        for config in configs if form.name == name else ():
            y = kernel.run_config(x.cuda(), layout, bias.cuda(), parsed, config)
            assert relative_error(y.cpu(), expected) < 1e-2, config
            ran += 1
torch.cuda.synchronize()
print("ran:", ran)
"""
FORMS = [
    *(("wgmma-sparse", "2:4"), ("mma-sparse", "2:4"), ("wgmma-4:8", "4:8"), ("wgmma-unstructured", "unstructured")),
    *(("expand", pattern) for pattern in ("2:4", "4:8", "unstructured")),
]


LEVELS = """
import sys
from dataclasses import replace

import torch
from products import random_keep, relative_error
from sparse_engine import formats, registry
from sparse_engine.backends.cuda_levels import quantise_rows
from sparse_engine.levels import levels_of_rows, relu_bound
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

parsed, kernel, ran = SparsityPattern.parse("2:4"), registry.get("cuda_nm_8bit"), 0
for shape, m in (((200, 1288), 300), ((72, 520), 3)):
    keep = random_keep(shape, parsed, torch.Generator().manual_seed(0))
    packed = formats.for_pattern(parsed).pack(torch.randn(shape).bfloat16(), Mask(parsed, keep), value_type=sys.argv[1]).to("cuda")
    layout = kernel.prepare(packed)
    x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x.double(), formats.get("nm").unpack(packed).double())
    for config in kernel.configs(registry.Problem.of(packed, m))[:4]:
        # Levels of three bits of fraction and of eight differ from the values by some per cent at most.
        assert relative_error(kernel.run_config(x, layout, None, parsed, config), expected) < 0.06, config
        ran += 1
    if sys.argv[1] == "fp8":
        bound = relu_bound(layout["norm"].cpu(), None)
        ahead = levels_of_rows(x.cpu(), layout["weight"].dtype, bound).ahead.cuda()
        made = kernel.relu_levels(replace(quantise_rows(x, layout["weight"].dtype), ahead=ahead), layout, None, parsed)
        assert relative_error(made.values.double() * made.scales[:m, None].double(), expected.relu()) < 0.06
        ran += 1
torch.cuda.synchronize()
print("ran:", ran)
"""


def test_what_race_checks_look_at_compiles(tmp_path: Path) -> None:
    """Kernels whose warps arrive lane by lane, alone and in clusters."""
    rows = cuda_row_stream.row_of("2:4", 1024, 4, 2, 2, 1, 4, 2)
    forms = [(cuda_row_stream.SOURCE, rows.macros(torch.bfloat16))]
    forms += [(TO_LEVELS.file, dict(TO_LEVELS.all_macros(tile, torch.bfloat16))) for tile in (TILES[0], TILES[-2])]
    for file, macros in forms:
        assert "0 bytes gmem" in nvcc("90a", file, macros | {"EVERY_LANE_ARRIVES": 1}, tmp_path)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(("file", "patterns", "tiles"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_decode_kernels_are_clean(file: str, patterns: str, tiles: list[tuple[int, ...]], tool: str) -> None:
    said = run_clean(tool, ("decode", "arrange"), PRODUCTS, file, patterns, repr(tiles))
    assert f"clean: {len(tiles) * len(patterns.split(','))}" in said


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize(("name", "pattern"), FORMS)
def test_prefill_kernels_are_clean(name: str, pattern: str, tool: str) -> None:
    _check(run_clean(tool, ("prefill", "expand"), PREFILL, name, pattern))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8_bit_kernels_are_clean(kind: str, tool: str) -> None:
    _check(run_clean(tool, ("prefill", "quantise"), LEVELS, kind))


def _check(said: str) -> None:
    ran = re.search(r"ran: (\d+)", said)
    assert ran is not None
    assert int(ran[1]) > 0
