"""8-bit 2:4 weights on the GPU: the layout is an exact permutation (on any machine); levels, products and epilogues (on a GPU)."""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from cuda_products import H200, nvcc
from products import random_keep, relative_error

from sparse_engine import cuda, formats, registry, tuning
from sparse_engine.backends import cuda_levels, cuda_nm_8bit
from sparse_engine.backends.cuda_prefill.wgmma import PrefillTile
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.levels import LARGEST, SCALES_PADDING, levels_of_rows, relu_bound
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.tuning import Measured

PATTERN = SparsityPattern.parse("2:4")
SHAPES = [(16, 256), (33, 260), (1, 4), (200, 1028), (768, 768)]


KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])
ELEMENTS = pytest.mark.parametrize("element", list(cuda_levels.LEVELS), ids=str)


def make_packed(shape: tuple[int, int], dtype: torch.dtype, kind: str, device: str = "cpu") -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    weight[shape[0] // 2] = 0.0
    keep = random_keep(shape, PATTERN, generator)
    return formats.for_pattern(PATTERN).pack(weight.to(dtype), Mask(PATTERN, keep), value_type=kind).to(device)


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_gives_back_the_packed_weight(shape: tuple[int, int], kind: str) -> None:
    packed = make_packed(shape, torch.bfloat16, kind)
    kernel = registry.get("cuda_nm_8bit")
    layout = kernel.prepare(packed)
    assert sum(t.numel() * t.element_size() for t in layout.values()) == kernel.layout_nbytes(registry.Problem.of(packed, 1), packed)
    recovered = kernel.recover(layout, replace(packed, tensors={}))
    assert recovered.tensors.keys() == packed.tensors.keys()
    for name, tensor in packed.tensors.items():
        assert torch.equal(recovered.tensors[name], tensor), name


def test_blocks_hold_what_the_instruction_expects() -> None:
    """A product of the layout alone, as the operands of wgmma m64nNk64 are defined (PTX ISA, sparse wgmma: metadata, and the matrix
    descriptor's pattern of 64 bytes)."""
    packed = make_packed((128, 256), torch.bfloat16, "int8")
    blocks = cuda_nm_8bit.to_blocks(packed.tensors["values"], packed.tensors["bitmask"], packed.shape)
    found = torch.zeros(packed.shape, dtype=torch.int8)
    for block in range(2):
        for stage in range(2):
            stored = blocks[block, stage].tolist()
            for row in range(64):
                warp, half, g = row // 16, row // 8 % 2, row % 8
                for column in range(0, 128, 4):
                    step, k_half, group = column // 64, column // 32 % 2, column % 32 // 4
                    thread = 32 * warp + 4 * g + 2 * k_half + half
                    code = stored[4096 + 8 * thread + 4 * step + group // 2] & 255
                    code = code >> 4 if group % 2 else code & 15
                    for index in range(2):
                        # Bits 4 and 5 of the place of a byte are exchanged with bits 7 and 8.
                        place = 64 * row + column // 2 + index
                        place ^= (place >> 7 & 3) << 4
                        found[64 * block + row, 128 * stage + column + (code >> 2 * index & 3)] = stored[place]
    assert torch.equal(found.float() * packed.tensors["scales"][:, None], formats.get("nm").unpack(replace(packed, dtype=torch.float32)))


def test_rows_of_a_layout_are_a_layout() -> None:
    packed = make_packed((200, 256), torch.bfloat16, "fp8")
    kernel = registry.get("cuda_nm_8bit")
    layout = kernel.prepare(packed)
    assert kernel.rows_of(layout, 16, 64) is None
    for begin, end in ((0, 64), (64, 192), (128, 200)):
        part = kernel.rows_of(layout, begin, end)
        assert part is not None
        recovered = kernel.recover(part, replace(packed, shape=(end - begin, 256), tensors={}))
        for name, tensor in packed.tensors.items():
            assert torch.equal(recovered.tensors[name], tensor[begin:end]), name


def test_parameters_match_the_source() -> None:
    text = (cuda.source_folder() / "quantise_rows.cu").read_text()
    body = re.search(r"struct Params \{(.*?)\};", text, re.S)
    assert body is not None
    lines = [line.strip() for line in re.sub(r"//.*", "", body[1]).split(";")]
    declared = [name for line in lines for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line)]
    assert declared == [name for name, _ in cuda_levels._Params._fields_]
    assert ctypes.sizeof(cuda_levels._Params) == 48


@pytest.mark.parametrize(
    ("shape", "m", "expected"),
    [
        ((16384, 4096), 4096, (256, 192)),
        ((4096, 16384), 4096, (128, 256)),
        ((12288, 4096), 1024, (128, 256)),
        ((4096, 16384), 512, (128, 128)),
        ((16384, 4096), 256, (128, 256)),
        ((4096, 4096), 256, (128, 64)),
        ((768, 768), 1, (128, 32)),
    ],
)
def test_the_estimate_prefers_what_was_fastest(shape: tuple[int, int], m: int, expected: tuple[int, int]) -> None:
    """On an H100, but for the single row, where the smallest tile has the least work that is thrown away."""
    first = cuda_nm_8bit._ordered_tiles(*shape, m, H200)[0]
    assert (first.rows, first.tokens) == expected


def test_a_measured_tile_goes_before_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    here = replace(H200, name="GPU without a table")

    def tile(element: torch.dtype, m: int) -> PrefillTile:
        cuda_nm_8bit._tile_for.cache_clear()
        return cuda_nm_8bit._tile_for(element, torch.bfloat16, 4096, 4096, m, here)

    estimated, *others = cuda_nm_8bit._ordered_tiles(4096, 4096, 256, here)
    assert tile(torch.int8, 256) == tile(torch.float8_e4m3fn, 256) == estimated

    def record(kind: str, config: tuple[object, ...]) -> None:
        found = {"cuda_nm_8bit": Measured(1.0, config)}
        tuning.record(here.name, [tuning.Entry(f"2:4 {kind}", torch.bfloat16, (4096, 4096), 256, found)])

    record("int8", ("wgmma-8bit", *astuple(others[0])))
    assert tile(torch.int8, 256) == tile(torch.float8_e4m3fn, 256) == others[0], "one type stands in for the other"
    assert tile(torch.int8, 1024) == cuda_nm_8bit._ordered_tiles(4096, 4096, 1024, here)[0]
    record("fp8", ("wgmma-8bit", *astuple(others[1])))
    assert (tile(torch.int8, 256), tile(torch.float8_e4m3fn, 256)) == (others[0], others[1])
    record("int8", ("wgmma-8bit", 1, 2, 3))
    assert tile(torch.int8, 256) == others[1], "a configuration of another version is passed over"


@pytest.mark.parametrize("element", cuda_levels.LEVELS, ids=str)
def test_levels_are_made_without_spills(element: torch.dtype, tmp_path: Path) -> None:
    source, _, macros = cuda_levels.quantise_compilation("sm_90a", torch.bfloat16, element)
    assert "0 bytes spill stores" in nvcc("90a", source, dict(macros), tmp_path)


@pytest.mark.parametrize("tile", cuda_nm_8bit.TILES, ids=str)
def test_tiles_compile_within_their_registers(tile: PrefillTile, tmp_path: Path) -> None:
    # Sums of both types have as many registers; one type of values compiles every tile, the other the first.
    elements = list(cuda_nm_8bit.SOURCES)[: 2 if tile == cuda_nm_8bit.TILES[0] else 1]
    for element in elements:
        source = cuda_nm_8bit.SOURCES[element]
        assert source.fits(tile, H200)
        said = nvcc("90a", source.file, dict(source.all_macros(tile, torch.bfloat16)), tmp_path)
        spills = re.search(r"(\d+) bytes spill stores", said)
        assert spills is not None
        assert int(spills[1]) <= 8
        assert "serialized" not in said
        assert "injected" not in said


@pytest.mark.parametrize("tile", [tile for tile in cuda_nm_8bit.TILES if tile.splits == 1], ids=str)
def test_tiles_that_leave_levels_compile_within_their_registers(tile: PrefillTile, tmp_path: Path) -> None:
    said = nvcc("90a", cuda_nm_8bit.TO_LEVELS.file, dict(cuda_nm_8bit.TO_LEVELS.all_macros(tile, torch.bfloat16)), tmp_path)
    spills = re.search(r"(\d+) bytes spill stores", said)
    assert spills is not None
    # The largest tile has more sums than others, and a few addresses are read again behind its products.
    assert int(spills[1]) <= (24 if tile.n_tiles * tile.m_blocks > 40 else 8)
    assert "serialized" not in said


def test_lanes_exchange_what_makes_four_neighbours_of_a_row() -> None:
    """The exchange of prefill_levels.cuh, lane by lane: sums of an n-tile as wgmma leaves them (PTX ISA, fragment D of m64nNk32)."""
    text = (cuda.source_folder() / "include" / "prefill_levels.cuh").read_text()
    near_odd, near_even, far_odd, far_even = (int(code, 16) for code in re.findall(r"\b0x([0-7]{4})\b", text))

    def permuted(own: list[int], other: list[int], code: int) -> list[int]:
        return [(own + other)[code >> 4 * i & 7] for i in range(4)]

    # Weight row and activation row of each byte.
    held = [[(g + 8 * half, 2 * q + token) for half in (0, 1) for token in (0, 1)] for g in range(8) for q in range(4)]
    lanes: list[list[int]] = [[row * 8 + token for row, token in one] for one in held]
    lanes = [permuted(lanes[i], lanes[i ^ 4], near_odd if i & 4 else near_even) for i in range(32)]
    lanes = [permuted(lanes[i], lanes[i ^ 8], far_odd if i & 8 else far_even) for i in range(32)]
    for lane, found in enumerate(lanes):
        g, q = lane >> 2, lane & 3
        token, word = 2 * q + (g & 1), (g >> 1 & 1) * 2 + (g >> 2)
        assert found == [(4 * word + i) * 8 + token for i in range(4)], lane


@KINDS
def test_a_bound_clips_nothing_and_costs_next_to_nothing(kind: str) -> None:
    """Of floating-point levels, whose scale is known before the product; int8 has none."""
    torch.manual_seed(0)
    packed = make_packed((512, 256), torch.bfloat16, kind)
    layout = registry.get("cuda_nm_8bit").prepare(packed)
    norm = registry.get("cuda_nm_8bit").relu_norm(layout)
    if kind == "int8":
        assert norm is None
        assert not registry.get("cuda_nm_8bit").leaves_levels(layout, 300, torch.bfloat16)
        return
    assert norm is not None
    weight = formats.get("nm").unpack(replace(packed, dtype=torch.float32)).double()
    assert norm.item() == pytest.approx(weight.norm(dim=1).max().item(), rel=1e-5)
    x, bias = torch.randn(37, 256).bfloat16(), torch.randn(512).bfloat16()
    x[3] = weight[weight.norm(dim=1).argmax()].bfloat16()  # the row that comes nearest to the bound
    x[5] = 0.0
    tokens = levels_of_rows(x, torch.float8_e4m3fn, relu_bound(norm, bias))
    assert tokens.ahead is not None
    y = ((tokens.values.double() * tokens.scales[:37, None].double()) @ weight.T + bias.double()).clamp_min(0)
    scales = tokens.ahead[0, :37, None].double()
    assert bool((y <= scales * LARGEST[torch.float8_e4m3fn]).all())
    left = (y / scales).float().to(torch.float8_e4m3fn).double() * scales
    own = levels_of_rows(y.float(), torch.float8_e4m3fn)
    best = own.values.double() * own.scales[:37, None].double()
    assert relative_error(left, y) < 1.3 * relative_error(best, y)


@ELEMENTS
def test_levels_are_the_nearest_to_the_row(element: torch.dtype) -> None:
    x = torch.randn(9, 300).bfloat16()
    x[3] = 0.0
    made = cuda_levels.quantise_rows(x, element)
    levels, scales = made.values, made.scales
    assert len(scales) == SCALES_PADDING
    assert torch.equal(levels.float().abs().amax(1), torch.where(torch.arange(9) == 3, 0.0, LARGEST[element]))
    # Half a level of int8; of fp8 a sixteenth of the element, or half of the smallest level.
    off = (levels.double() * scales[:9, None].double() - x.double()).abs()
    most = scales[:9, None].double() / 2 if element is torch.int8 else (x.double().abs() / 16).clamp_min(scales[:9, None].double() * 2**-10)
    assert bool((off <= most * (1 + 1e-5)).all())


@pytest.mark.gpu
@ELEMENTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [256, 260, 1030, 9216])
def test_levels_of_rows(columns: int, dtype: torch.dtype, element: torch.dtype) -> None:
    wide = torch.randn(37, columns + 3, device="cuda", dtype=dtype)
    wide[5] = 0.0
    for x in (wide[:, :columns].contiguous(), wide[:, 1 : columns + 1]):
        made, expected = cuda_levels.quantise_rows(x, element), levels_of_rows(x.cpu(), element)
        assert torch.equal(made.values.cpu().float(), expected.values.float())
        assert torch.equal(made.scales[:37].cpu(), expected.scales[:37])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@KINDS
@pytest.mark.parametrize("shape", [*SHAPES, (520, 2048)], ids=str)
def test_product_is_that_of_the_levels(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    packed = make_packed(shape, dtype, kind, "cuda")
    kernel = registry.get("cuda_nm_8bit")
    layout = kernel.prepare(packed)
    weight = formats.get("nm").unpack(replace(packed, dtype=torch.float32)).double()
    for m in (1, 3, 17, 129, 300, 1100):
        x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype) if m % 2 else None
        residual = torch.randn(m, shape[0], device="cuda", dtype=dtype) if m % 3 else None
        tokens = cuda_levels.quantise_rows(x, packed.tensors["values"].dtype)
        expected = (tokens.values.double() * tokens.scales[:m, None].double()) @ weight.T
        if bias is not None:
            expected += bias.double()
        expected = expected.clamp_min(0)
        if residual is not None:
            expected += residual.double()
        for config in [(), *kernel.configs(registry.Problem.of(packed, m))]:
            torch.full((m, shape[0]), float("nan"), device="cuda", dtype=dtype)
            if config:
                y = kernel.run_config(x, layout, bias, PATTERN, config).clamp_min(0)
                y = y if residual is None else y + residual
            else:
                y = kernel.run_fused(x, layout, bias, PATTERN, relu=True, residual=residual)
            assert relative_error(y, expected) < (1e-2 if dtype is torch.bfloat16 else 2e-3), (m, config)
        y = kernel.run_levels(tokens, layout, bias, PATTERN, relu=True, residual=residual)
        assert torch.equal(y, kernel.run_fused(x, layout, bias, PATTERN, relu=True, residual=residual))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (520, 2048), (3072, 768)], ids=str)
def test_levels_are_left_behind_a_relu(shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = make_packed(shape, dtype, "fp8", "cuda")
    kernel = registry.get("cuda_nm_8bit")
    layout = kernel.prepare(packed)
    norm = kernel.relu_norm(layout)
    assert norm is not None
    weight = formats.get("nm").unpack(replace(packed, dtype=torch.float32)).double()
    tiles = [tile for tile in cuda_nm_8bit.TILES if tile.splits == 1]
    for m in (1, 3, 17, 129, 300, 1153):
        x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype) if m % 2 else None
        tokens = levels_of_rows(x, torch.float8_e4m3fn, relu_bound(norm, bias))
        assert tokens.ahead is not None
        expected = (tokens.values.double() * tokens.scales[:m, None].double()) @ weight.T
        expected = (expected if bias is None else expected + bias.double()).clamp_min(0)
        scales = tokens.ahead[0, :m, None].double()
        # Sums of fp8 products have fewer bits than those of float64, and may so be rounded to the level beside.
        nearest = (expected / scales).float().to(torch.float8_e4m3fn).double() * scales
        for tile in tiles:
            monkeypatch.setattr(cuda_nm_8bit, "_tile_for", lambda *_, tile=tile: tile)
            assert kernel.leaves_levels(layout, m, dtype)
            torch.full((m, -(-shape[0] // 16) * 16), 127, device="cuda", dtype=torch.uint8)  # NaN, where nothing is written
            made = kernel.relu_levels(tokens, layout, bias, PATTERN)
            assert made.values.shape == (m, shape[0])
            found = made.values.double() * made.scales[:m, None].double()
            assert relative_error(found, nearest) < 2e-2, (m, tile)
        monkeypatch.setattr(cuda_nm_8bit, "_tile_for", lambda *_: PrefillTile(16, 1, 2, 6, 1, splits=2))
        assert not kernel.leaves_levels(layout, m, dtype)
    with pytest.raises(InputError, match="relu_bound"):
        kernel.relu_levels(replace(tokens, ahead=None), layout, None, PATTERN)


def product_of_levels(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """float64 product (M, out) of the levels that x (M, in) becomes."""
    tokens = cuda_levels.quantise_rows(x, packed.tensors["values"].dtype)
    weight = formats.get("nm").unpack(replace(packed, dtype=torch.float32)).double()
    return (tokens.values.double() * tokens.scales[: len(x), None].double()) @ weight.T


@pytest.mark.gpu
@KINDS
def test_strided_and_unaligned_activations(kind: str) -> None:
    packed = make_packed((136, 772), torch.bfloat16, kind, "cuda")
    kernel = registry.get("cuda_nm_8bit")
    layout = kernel.prepare(packed)
    wide = torch.randn(300, 1648, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, :772], wide[:, 8:780], wide[:, 1:773], wide[:, :1544:2], wide[::2, 8:780], wide[:, :772].reshape(2, 150, 772)):
        y = kernel.run(x, layout, None, PATTERN)
        assert y.shape == (*x.shape[:-1], 136)
        assert relative_error(y.reshape(-1, 136), product_of_levels(x.reshape(-1, 772), packed)) < 1e-2


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("m", [2, 300])
def test_graph_and_side_stream(m: int, kind: str) -> None:
    packed = make_packed((512, 512), torch.bfloat16, kind, "cuda")
    kernel = registry.get("cuda_nm_8bit")
    layout = kernel.prepare(packed)
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        side = kernel.run(x, layout, None, PATTERN)
    torch.cuda.current_stream().wait_stream(stream)
    assert relative_error(side, product_of_levels(x, packed)) < 1e-2

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Nothing between, so that a kernel reading its input before its predecessor wrote it shows.
        chain = [x * 2]
        for _ in range(3):
            chain.append(kernel.run(chain[-1], layout, None, PATTERN))
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(m, 512) * 0.01)
        graph.replay()
        for before, after in itertools.pairwise(chain):
            assert relative_error(after, product_of_levels(before, packed)) < 1e-2


@pytest.mark.gpu
def test_wrong_arguments_are_refused_and_the_operator_is_sound() -> None:
    packed = make_packed((64, 256), torch.bfloat16, "fp8", "cuda")
    kernel = registry.get("cuda_nm_8bit")
    layout = kernel.prepare(packed)
    with pytest.raises(InputError, match="take bfloat16 or float16"):
        kernel.run(torch.zeros(1, 256, device="cuda"), layout, None, PATTERN)
    with pytest.raises(InputError, match="x has 128 columns"):
        kernel.run(torch.zeros(1, 128, device="cuda", dtype=torch.bfloat16), layout, None, PATTERN)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    # The check multiplies its arguments by themselves, which torch cannot do with fp8.
    layout = kernel.prepare(make_packed((64, 256), torch.bfloat16, "int8", "cuda"))
    arguments = (x, layout["weight"], layout["scales"], None, None, 64, 256, False)
    torch.library.opcheck(torch.ops.sparse_engine.cuda_nm_8bit_linear.default, arguments)
