"""The Triton kernels: products under Triton's interpreter (on any machine) or on a GPU, and how the package holds them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_engine import formats, registry, tuning
from sparse_engine.backends import triton_bitmask
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import PackedWeight, pack_bits
from sparse_engine.linear import SparseLinear
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PER_ROW = (1, 3, 7, 16, 17, 33, 129)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Odd numbers of rows; columns that end inside a mask byte, and below, at and behind the columns of a step or of a part.
SHAPES = {
    "1:2": [(3, 62)],
    "2:4": [(13, 260), (1, 4), (5, 1028)],
    "4:8": [(7, 264), (3, 1032)],
    "1:4": [(9, 300)],
    "5:8": [(2, 168)],
    "3:16": [(6, 272), (1, 16)],
    "16:32": [(5, 544)],
    "0.5": [(11, 263), (1, 3), (3, 1031)],
    "0.9": [(6, 513)],
}
# A pattern for each way to find values, with rows that split into parts of which the last is short.
SPLIT = {"2:4": (5, 1544), "4:8": (3, 1032), "5:8": (3, 1072), "3:16": (3, 1040), "0.5": (5, 1031)}


def _import_kernel() -> tuple[ModuleType | None, str]:
    """kernels/bitmask.py as installed, interpreted where there is no GPU; or why it cannot be had."""
    if reason := triton_bitmask._why_unavailable():
        return None, f"the Triton kernel {reason}"
    if DEVICE == "cuda":
        return importlib.import_module("sparse_engine.kernels.bitmask"), ""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "something imported triton before this module could choose its interpreter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("sparse_engine.kernels.bitmask"), ""


BITMASK, WHY_NOT = _import_kernel()


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> Iterator[None]:
    # Triton reads the variable both when a function is decorated and at its first calls; other modules' tests must not see it.
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


needs_kernel = pytest.mark.skipif(BITMASK is None, reason=WHY_NOT)


def make_packed(pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: str = DEVICE) -> PackedWeight:
    """A random weight; an unstructured one has an empty row, at the end too, and a full one."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    parsed = SparsityPattern.parse(pattern)
    weight = torch.randn(shape, generator=generator)
    if parsed.is_nm:
        n, m = parsed.group
        order = torch.rand(shape[0], shape[1] // m, m, generator=generator).argsort(-1)
        keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(2, order[..., :n], True).view(shape)
    else:
        keep = torch.rand(shape, generator=generator) >= (parsed.sparsity or 0)
        keep[shape[0] // 3] = True
        if shape[0] > 2:
            keep[[0, shape[0] // 2, -1]] = False
    return formats.for_pattern(parsed).pack(weight.to(dtype), Mask(parsed, keep)).to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def expected_product(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    product = x.double() @ formats.get(packed.format).unpack(packed).double().T
    return product if bias is None else product + bias.double()


def packed_arguments(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> tuple[object, ...]:
    layout = registry.get("triton_bitmask").prepare(packed)
    tensors = (x, layout["values"], layout["bitmask"], layout.get("row_offsets"), layout.get("chunk_starts"), bias)
    return *tensors, packed.pattern.n or 0, packed.pattern.m or 0


def launch(x: Tensor, packed: PackedWeight, bias: Tensor | None, tile: Any = None) -> Tensor:
    """The kernels' result in memory full of NaN, with what lies around it checked to be left alone."""
    assert BITMASK is not None
    tile = tile or BITMASK.default_tile(x.shape[0], *packed.shape, x.dtype)
    size = x.shape[0] * packed.shape[0]
    memory = torch.full((size + 64,), float("nan"), dtype=x.dtype, device=x.device)
    out = memory[32 : 32 + size].view(x.shape[0], packed.shape[0])
    arguments = packed_arguments(x, packed, bias)
    # torch then fills what it allocates with NaN: the sums of a split product's parts too.
    torch.use_deterministic_algorithms(True)
    try:
        assert BITMASK.bitmask_linear(*arguments, tile, out) is out
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(memory[:32].isnan().all())
    assert bool(memory[32 + size :].isnan().all())
    return out


def operands(packed: PackedWeight, m: int) -> tuple[Tensor, Tensor]:
    """Random x (m, columns) and bias (rows,), the same at each call."""
    generator = torch.Generator().manual_seed(m)
    x, bias = (torch.randn(size, generator=generator) for size in ((m, packed.shape[1]), packed.shape[:1]))
    return x.to(DEVICE, packed.dtype), bias.to(DEVICE, packed.dtype)


def assert_product(packed: PackedWeight, m: int, *, with_bias: bool, tile: Any = None) -> Tensor:
    x, bias = operands(packed, m)
    y = launch(x, packed, bias if with_bias else None, tile)
    assert relative_error(y, expected_product(x, packed, bias if with_bias else None)) < TOLERANCE[packed.dtype]
    return y


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


def problem(rows: int, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Problem:
    parsed = SparsityPattern.parse(pattern)
    return Problem(formats.for_pattern(parsed).name, parsed, dtype, device, 4096, 4096, rows, (9, 0) if device == "cuda" else None)


def test_rejections_say_why() -> None:
    kernel = registry.get("triton_bitmask")
    assert kernel.rejects(problem(1, device="cpu")) == "runs on cuda, not cpu"
    if BITMASK is not None:
        # Every bucket of rows, so that the backend can be forced for a whole model.
        for rows in registry.ROW_BUCKETS:
            for pattern in SHAPES:
                for dtype in TOLERANCE:
                    assert kernel.rejects(problem(rows, pattern, dtype)) is None


@pytest.mark.parametrize(
    ("missing", "message"), [("triton", "needs triton, which is not installed"), ("sparse_engine.kernels", "only an installed")]
)
def test_missing_modules_are_a_reason(missing: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        if name.startswith(missing):
            if name != missing:
                raise ModuleNotFoundError(missing)
            return None
        return object()

    monkeypatch.setattr(triton_bitmask, "find_spec", find)
    for cached in (triton_bitmask._why_unavailable, triton_bitmask._kernels):
        cached.cache_clear()
    try:
        reason = registry.get("triton_bitmask").rejects(problem(1))
        assert reason is not None
        assert message in reason
        with pytest.raises(KernelUnavailableError, match=message):
            triton_bitmask._kernels()
    finally:
        for cached in (triton_bitmask._why_unavailable, triton_bitmask._kernels):
            cached.cache_clear()


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (16384, 4096), (36864, 9216)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 128, 4096])
def test_measured_kernels_go_first_and_the_reference_last(shape: tuple[int, int], rows: int) -> None:
    for pattern, faster in (("2:4", "cuda_nm"), ("4:8", "cuda_nm"), ("0.5", "cuda_unstructured")):
        parsed = SparsityPattern.parse(pattern)
        case = Problem(formats.for_pattern(parsed).name, parsed, torch.bfloat16, "cuda", *shape, rows, (9, 0))
        costs = [registry.get(name).cost(case) for name in (faster, "triton_bitmask", "reference")]
        assert costs == sorted(costs)


def test_wrong_arguments_are_refused() -> None:
    for pattern, x, bias, message in (
        ("2:4", torch.zeros(1, 16, dtype=torch.float16), None, "convert them to one type"),
        ("2:4", torch.zeros(1, 12), None, "x has 12 columns"),
        ("2:4", torch.zeros(1, 16), torch.zeros(5), "the bias has shape"),
        ("2:4", torch.zeros(1, 16, device="meta"), None, "move them to one device"),
    ):
        packed = make_packed(pattern, (4, 16), torch.float32, "cpu")
        with pytest.raises(InputError, match=message):
            triton_bitmask._linear(*packed_arguments(x, packed, bias), "", [])
    packed = make_packed("0.5", (4, 16), torch.float32, "cpu")
    arguments = list(packed_arguments(torch.zeros(1, 16), packed, None))
    arguments[4] = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(InputError, match=r"chunk_starts has shape \(4, 2\), expected \(4, 1\)"):
        triton_bitmask._linear(*arguments, "", [])


@needs_kernel
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("gemm", 1, 4, 32, 1, 1, 4), "a form of gemv or dot"),
        (("gemv", 1, 4, 32), "it is not \\(form, block_m, block_rows, block_bytes, depth, parts, warps\\)"),
        (("dot", 16, 64, 8, 0, 1, 4), "sizes above 0"),
        (("dot", 16, 64, 8, 3, 17, 4), "at most 16 parts, not 17"),
        (("dot", 16, 48, 8, 3, 1, 4), "block_rows is 48, which is no power of two"),
        (("gemv", 1, 2, 32, 1, 1, 4), "4 warps on 32 bytes a step cover 4 rows, not 1 to block_rows = 2"),
        (("gemv", 1, 2, 256, 1, 1, 4), "cover 0 rows"),
        (("dot", 8, 64, 8, 3, 1, 4), "at least 16 activation rows"),
    ],
    ids=str,
)
def test_configurations_that_cannot_run_are_refused(config: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        triton_bitmask._tile(config[0], config[1:])


@needs_kernel
def test_tile_too_large_for_the_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BITMASK is not None

    def refuse(*_: object) -> None:
        raise BITMASK.OutOfResources(81920, 65536, "shared memory")

    monkeypatch.setattr(BITMASK, "bitmask_linear", refuse)
    tile = BITMASK.Tile("dot", 128, 128, 8, 3, 1, 8)
    with pytest.raises(KernelUnavailableError, match=r"cannot run \['dot', 128, 128, 8, 3, 1, 8\] on this GPU: .*Required: 81920"):
        triton_bitmask._launch(BITMASK, tile, None)


@needs_kernel
def test_measured_configuration_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BITMASK is not None
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    gpu, shape = "A GPU that is nowhere", (768, 768)
    measured = {1: ("gemv", 1, 4, 32, 4, 2, 4), 64: (), 128: ("dot", 1.5)}
    entries = [
        tuning.Entry("2:4", torch.bfloat16, shape, rows, {"triton_bitmask": tuning.Measured(1.0, config)})
        for rows, config in measured.items()
    ]
    tuning.record(gpu, entries)
    assert triton_bitmask._choose(gpu, "2:4", torch.bfloat16, shape, 1) == BITMASK.Tile("gemv", 1, 4, 32, 4, 2, 4)
    for rows in (5, 64):
        default = BITMASK.default_tile(rows, *shape, torch.bfloat16)
        assert triton_bitmask._choose(gpu, "2:4", torch.bfloat16, shape, rows) == default
    with pytest.raises(InputError, match=r"gives triton_bitmask \['dot', 1.5\], not a form and whole sizes"):
        triton_bitmask._choose(gpu, "2:4", torch.bfloat16, shape, 128)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_layout_is_as_large_as_foretold(pattern: str) -> None:
    packed = make_packed(pattern, (7, 1032), torch.float32, "cpu")
    kernel = registry.get("triton_bitmask")
    layout = kernel.prepare(packed)
    assert kernel.layout_nbytes(Problem.of(packed, 1), packed) == sum(t.nbytes for t in layout.values())


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    packed = make_packed("2:4", (4, 16), torch.float32, "cpu")
    y = triton_bitmask._linear(*packed_arguments(torch.zeros(shape), packed, None), "", [])
    assert y.shape == (*shape[:-1], 4)


def test_finding_backends_imports_no_kernel() -> None:
    code = (
        "import sys; from sparse_engine import registry; registry.all_kernels(); print([m for m in sys.modules if 'engine.kernels' in m])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_kernels_is_no_package_of_its_own() -> None:
    # transformers looks for a PyPI package called `kernels`; a folder of that name with an __init__.py would be taken for it.
    assert not (Path(__file__).parents[1] / "kernels" / "__init__.py").exists()
    try:
        installed = metadata.files("sparse-engine") or []
    except metadata.PackageNotFoundError:
        pytest.skip("sparse-engine is not installed")
    assert not [path for path in installed if path.parts[0] == "kernels" or path.parts[-2:] == ("kernels", "__init__.py")]


@needs_kernel
def test_kernels_lie_inside_the_package() -> None:
    inside = find_spec("sparse_engine.kernels")
    assert inside is not None
    # A namespace package: no file of its own.
    assert inside.origin is None
    # An editable install puts the checkout on the path, where the folder is a namespace portion: a real package of that name
    # still wins over it, and nothing of ours can be imported as one.
    code = "from importlib.util import find_spec; s = find_spec('kernels'); print(s.origin if s else None)"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    origin = result.stdout.strip()
    assert origin == "None" or not (Path(origin).parent / "bitmask.py").exists()


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
