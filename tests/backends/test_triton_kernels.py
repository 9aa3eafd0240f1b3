"""The Triton kernels: products under Triton's interpreter (on any machine) or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from products import expected_product, relative_error
from triton_products import (
    BITMASK,
    DEVICE,
    PER_ROW,
    SHAPES,
    SPLIT,
    TOLERANCE,
    assert_product,
    launch,
    make_packed,
    needs_kernel,
    operands,
    packed_arguments,
)

from sparse_engine import formats, registry
from sparse_engine.backends import triton_bitmask
from sparse_engine.formats.base import PackedWeight, pack_bits
from sparse_engine.linear import SparseLinear
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Problem


@needs_kernel
@pytest.mark.parametrize("m", PER_ROW)
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_product_matches_fp64(pattern: str, m: int) -> None:
    # The larger shapes are left to few rows, since the interpreter takes seconds where a GPU takes microseconds.
    for shape in SHAPES[pattern] if m <= 7 else SHAPES[pattern][:1]:
        assert_product(make_packed(pattern, shape, torch.float32), m, with_bias=m % 3 == 0)


@needs_kernel
@pytest.mark.parametrize("m", PER_ROW)
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_half_types_match_fp64(pattern: str, m: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_product(make_packed(pattern, SHAPES[pattern][0], dtype), m, with_bias=m % 3 != 0)


@needs_kernel
@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("pattern", list(SPLIT))
def test_every_tile_gives_the_same_bits_twice(pattern: str, m: int) -> None:
    assert BITMASK is not None
    packed = make_packed(pattern, SPLIT[pattern], torch.float32 if m == 3 else torch.bfloat16)
    tiles = BITMASK.tiles(m, *packed.shape, packed.dtype)
    assert {tile.parts > 1 for tile in tiles} == {True, False}
    for tile in tiles:
        y = assert_product(packed, m, with_bias=True, tile=tile)
        if tile.parts > 1 or DEVICE == "cuda":
            x, bias = operands(packed, m)
            assert torch.equal(launch(x, packed, bias, tile), y)


@needs_kernel
@pytest.mark.parametrize("tile", [("gemv", 2, 8, 32, 2, 1, 4), ("dot", 16, 16, 2, 2, 3, 1), ("dot", 16, 32, 32, 1, 2, 2)], ids=str)
def test_tiles_may_be_cut_otherwise(tile: tuple[Any, ...]) -> None:
    # Several tiles of activation rows and of rows of W, and a step of more bytes than a chunk has or of fewer.
    assert BITMASK is not None
    for pattern in ("2:4", "0.5"):
        assert_product(make_packed(pattern, (21, 524), torch.float32), 17, with_bias=True, tile=BITMASK.Tile(*tile))


@needs_kernel
@pytest.mark.parametrize("pattern", ["4:8", "0.5"])
def test_tiles_of_a_prompts_rows(pattern: str) -> None:
    assert BITMASK is not None
    packed = make_packed(pattern, (65, 264), torch.bfloat16)
    tiles = BITMASK.tiles(257, *packed.shape, packed.dtype)
    for tile in {tile[:4]: tile for tile in tiles if tile.block_m == 256}.values() if DEVICE == "cpu" else tiles:
        assert_product(packed, 257, with_bias=True, tile=tile)


@needs_kernel
def test_weight_without_any_value_gives_the_bias() -> None:
    pattern = SparsityPattern.unstructured(0.9)
    shape = (5, 19)
    packed = formats.for_pattern(pattern).pack(torch.ones(shape), Mask(pattern, torch.zeros(shape, dtype=torch.bool))).to(DEVICE)
    bias = torch.randn(5, device=DEVICE)
    for m in (2, 17):
        assert torch.equal(launch(torch.randn(m, 19, device=DEVICE), packed, bias), bias.expand(m, 5))


@needs_kernel
@pytest.mark.parametrize("m", [3, 17])
def test_rows_of_x_may_lie_apart(m: int) -> None:
    packed = make_packed("2:4", (6, 36), torch.float32)
    x = torch.randn(m, 50, device=DEVICE)[:, 7:43]
    assert relative_error(launch(x, packed, None), expected_product(x, packed, None)) < TOLERANCE[torch.float32]


@needs_kernel
def test_unprepared_unstructured_rows_stay_whole() -> None:
    assert BITMASK is not None
    packed = make_packed("0.5", SPLIT["0.5"], torch.float32)
    x, _ = operands(packed, 1)
    tile = BITMASK.default_tile(1, *packed.shape, torch.float32)
    assert tile.parts > 1
    out = torch.full((1, packed.shape[0]), float("nan"), device=DEVICE)
    tensors = packed.tensors
    BITMASK.bitmask_linear(x, tensors["values"], tensors["bitmask"], tensors["row_offsets"], None, None, 0, 0, tile, out)
    assert torch.equal(out, launch(x, packed, None, tile._replace(parts=1)))


@needs_kernel
def test_parts_cover_every_row_once() -> None:
    assert BITMASK is not None
    for row_bytes in (1, 63, 64, 65, 96, 128, 129, 384, 1152, 2000):
        for parts in range(1, BITMASK.MAX_PARTS + 1):
            for size in (2, 32, 64, 128):
                length = BITMASK.part_bytes(BITMASK.Tile("gemv", 1, 4, size, 1, parts, 4), row_bytes)
                made = -(-row_bytes // length)
                assert made <= parts
                assert length % size == length % BITMASK.CHUNK_BYTES == 0


@needs_kernel
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_tiles_can_be_launched_and_start_with_the_default(dtype: torch.dtype) -> None:
    assert BITMASK is not None
    for shape in ((1, 8), (768, 768), (768, 3072), (2304, 768), (16384, 4096), (36864, 9216)):
        for m in (*registry.ROW_BUCKETS, *PER_ROW):
            tiles = BITMASK.tiles(m, *shape, dtype)
            assert tiles[0] == BITMASK.default_tile(m, *shape, dtype)
            assert len(set(tiles)) == len(tiles) <= 12
            assert [BITMASK.why_not(tile[0], tile[1:]) for tile in tiles] == [None] * len(tiles)


@pytest.mark.parametrize("columns", [3, 512, 513, 1500])
def test_chunk_starts_count_the_values_before(columns: int) -> None:
    keep = torch.rand(4, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    starts = triton_bitmask.chunk_starts(pack_bits(keep))
    expected = [[int(row[: 512 * chunk].sum()) for chunk in range(-(-columns // 512))] for row in keep]
    assert starts.dtype == torch.int32
    assert starts.tolist() == expected


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_packed_tensors_come_back_from_the_layout(pattern: str) -> None:
    packed = make_packed(pattern, SHAPES[pattern][0], torch.float32, "cpu")
    kernel = registry.get("triton_bitmask")
    layout = kernel.prepare(packed)
    assert {name: t.data_ptr() for name, t in packed.tensors.items()}.items() <= {name: t.data_ptr() for name, t in layout.items()}.items()
    assert kernel.recover(layout, packed).tensors.keys() == packed.tensors.keys()


@needs_kernel
def test_kernel_and_backend_agree_on_chunks() -> None:
    assert BITMASK is not None
    assert BITMASK.CHUNK_BYTES == triton_bitmask._CHUNK_BYTES


COMPILE = """
import subprocess
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_engine.kernels import bitmask
from sparse_engine.kernels.bitmask_dot import bitmask_dot
from sparse_engine.kernels.bitmask_gemv import bitmask_gemv
from sparse_engine.kernels.split_k import add_parts

ELEMENTS = {torch.bfloat16: ("bf16", tl.bfloat16), torch.float16: ("fp16", tl.float16), torch.float32: ("fp32", tl.float32)}
# What torch and the layouts of OPT's widths align; as Triton's launcher would find it.
ALIGNED = {"R", "C", "x_stride", "part_bytes"}


def build(kernel, element, constants, options):
    # As the launcher would: 1 for M is a constant, and only what it may look at is known to be aligned.
    pointers = {name: "*" + element for name in ("x", "values", "bias", "y")}
    pointers |= {"bitmask": "*u8", "row_offsets": "*i64", "chunk_starts": "*i32", "parts": "*fp32"}
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED or name in pointers}
    aligned = {place: value for place, value in aligned.items() if place not in places}
    return triton.compile(ASTSource(kernel, signature, places, aligned), GPUTarget("cuda", CAPABILITY, 32), options)


def compile(tile, dtype, n, m, m_rows):
    kernel = bitmask_gemv if tile.form == "gemv" else bitmask_dot
    element, element_type = ELEMENTS[dtype]
    constants = {"KEEP": n, "GROUP": m, "WHOLE_BYTES": True}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_ROWS": tile.block_rows, "BYTES": tile.block_bytes}
    if m:
        constants |= {"row_offsets": None, "chunk_starts": None}
    if m_rows == 1:
        constants["M"] = 1
    options = {"num_warps": tile.warps}
    if tile.form == "gemv":
        constants |= {"ABREAST": 32 * tile.warps // tile.block_bytes, "UNROLL": tile.depth}
    else:
        constants["TYPE"] = element_type
        options["num_stages"] = tile.depth
    return build(kernel, element, constants, options)


build(add_parts, "bf16", {"M": 1, "PARTS": 3, "BLOCK": 512}, {"num_warps": 4})
for m_rows, shape, dtype, n, m in (
    (1, (768, 768), torch.bfloat16, 2, 4),
    (1, (16384, 4096), torch.bfloat16, 4, 8),
    (1, (16384, 4096), torch.float16, 0, 0),
    (8, (16384, 4096), torch.float32, 2, 4),
    (16, (4096, 4096), torch.bfloat16, 2, 4),
    (129, (4096, 4096), torch.bfloat16, 4, 8),
    (129, (4096, 4096), torch.float16, 0, 0),
    (129, (4096, 4096), torch.float32, 2, 4),
):
    tile = bitmask.default_tile(m_rows, *shape, dtype)
    compiled = compile(tile, dtype, n, m, m_rows)
    with open("kernel.cubin", "wb") as file:
        file.write(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    usage = subprocess.run([CUOBJDUMP, "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    print(tile.form, "STACK:0 " in usage, "v4.b32" in ptx, "evict_first" in ptx, "bar.sync" in ptx.partition("shfl")[0], sep=",")
"""


@needs_kernel
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    # In a process of its own, since here Triton may be interpreting; without a GPU this is where what the interpreter lets pass shows.
    import triton

    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    cuobjdump = str(triton.knobs.nvidia.cuobjdump.path)
    code = COMPILE.replace("CAPABILITY", str(capability)).replace("CUOBJDUMP", repr(cuobjdump))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # Nothing in local memory; 16 bytes a load of x, or of values in fp32; values of 2:4 and 4:8 leave the cache first; and the
    # loop of a gemv, which ends where lanes begin to add their sums, passes nothing between warps.
    four, indexed = "True,True,True", "True,True,False"
    gemv = [f"gemv,{four},False", f"gemv,{four},False", f"gemv,{indexed},False", f"gemv,{four},False"]
    assert result.stdout.split()[:4] == gemv
    assert [line.rsplit(",", 2)[0] for line in result.stdout.split()[4:]] == ["dot,True,True"] * 4


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:16", "0.5"])
def test_registered_kernel_matches_fp64(pattern: str, dtype: torch.dtype) -> None:
    kernel = registry.get("triton_bitmask")
    for i, m in enumerate((*PER_ROW, 1000)):
        packed = make_packed(pattern, ((771, 1600), (2304, 768), (8200, 544))[i % 3], dtype)
        columns = packed.shape[1]
        bias = torch.randn(packed.shape[0], device="cuda", dtype=dtype)
        wide = torch.randn(m, 2 * columns + 2, device="cuda", dtype=dtype)
        # Rows apart and aligned, rows apart and not, columns apart. Each alignment is compiled anew, so not all for every m.
        x = (wide[:, :columns], wide[:, 1 : columns + 1], wide[:, 2::2])[i // 2 % 3]
        y = kernel.run(x, kernel.prepare(packed), bias, packed.pattern)
        assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[dtype]


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
def test_every_configuration_matches_fp64(pattern: str, dtype: torch.dtype) -> None:
    kernel = registry.get("triton_bitmask")
    for shape in ((768, 3072), (8192, 2048)):
        packed = make_packed(pattern, shape, dtype)
        layout = kernel.prepare(packed)
        for m in (1, 8, 16, 128):
            x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
            expected = expected_product(x, packed, None)
            for config in kernel.configs(Problem.of(packed, m)):
                y = kernel.run_config(x, layout, None, packed.pattern, config)
                assert relative_error(y, expected) < TOLERANCE[dtype], config
                assert torch.equal(y, kernel.run_config(x, layout, None, packed.pattern, config)), config


@pytest.mark.gpu
@needs_kernel
def test_more_values_than_31_bits_count() -> None:
    rows, columns = 66_000, 65_536
    pattern = SparsityPattern.parse("2:4")
    values = torch.randn(rows, columns // 2, device="cuda", dtype=torch.bfloat16)
    bitmask = torch.full((rows, columns // 8), 0b1010_0011, dtype=torch.uint8, device="cuda")
    packed = PackedWeight("nm", 1, pattern, (rows, columns), torch.bfloat16, {"values": values, "bitmask": bitmask})
    tail = {name: tensor[-5:] for name, tensor in packed.tensors.items()}
    last = PackedWeight("nm", 1, pattern, (5, columns), torch.bfloat16, tail)
    for m in (1, 17):
        x = torch.randn(m, columns, device="cuda", dtype=torch.bfloat16)
        y = registry.get("triton_bitmask").run(x, packed.tensors, None, pattern)
        assert relative_error(y[:, -5:], expected_product(x, last, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_backend_can_be_forced_for_a_layer(pattern: str) -> None:
    packed = make_packed(pattern, (768, 768), torch.bfloat16)
    layer = SparseLinear.from_packed(packed, torch.randn(768, device="cuda", dtype=torch.bfloat16), backend="triton_bitmask")
    assert {kernel.name for _, kernel, _ in layer.plan()} == {"triton_bitmask"}
    for shape in ((1, 768), (2, 5, 768), (300, 768), (5000, 768)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        assert relative_error(layer(x), expected_product(x, packed, layer.bias)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("m", [2, 16])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_cuda_graph(pattern: str, m: int) -> None:
    packed = make_packed(pattern, (64, 2048), torch.bfloat16)
    kernel = registry.get("triton_bitmask")
    layout = kernel.prepare(packed)
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    assert BITMASK is not None
    assert BITMASK.default_tile(m, *packed.shape, x.dtype).parts > 1
    # Compiled before the capture, in which nothing may be loaded.
    kernel.run(x, layout, None, packed.pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.run(x, layout, None, packed.pattern)
    for _ in range(2):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_operator_registration(pattern: str) -> None:
    packed = make_packed(pattern, (32, 64), torch.bfloat16)
    for m in (2, 17):
        x = torch.randn(m, 64, device="cuda", dtype=torch.bfloat16)
        torch.library.opcheck(torch.ops.sparse_engine.triton_bitmask_linear.default, (*packed_arguments(x, packed, None), "", []))
