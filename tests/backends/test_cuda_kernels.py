"""The CUDA decode kernels: layouts are exact permutations (on any machine); products, graphs and streams (on a GPU)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_products import A100, H200, KERNEL_OF, TOLERANCE, make_packed, nvcc, problem_of
from products import expected_product, relative_error
from torch import Tensor

from sparse_engine import cuda, formats, registry
from sparse_engine.backends import cuda_decode, cuda_nm, cuda_tiles, cuda_unstructured
from sparse_engine.bench import tune
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.linear import SparseLinear
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.tuning import Measured

SHAPES = {
    "2:4": [(16, 256), (33, 260), (1, 4), (48, 768), (200, 1028)],
    "4:8": [(16, 256), (33, 264), (1, 8), (48, 768), (200, 1032)],
    "0.5": [(16, 256), (33, 263), (1, 3), (48, 768), (1100, 1030)],
    "0.7": [(40, 300), (17, 2049)],
}
CASES = [(pattern, shape) for pattern, shapes in SHAPES.items() for shape in shapes]


def op_call(
    x: Tensor, layout: registry.Layout, packed: PackedWeight, bias: Tensor | None, residual: Tensor | None, *, relu: bool
) -> tuple[Callable[..., Tensor], tuple[object, ...]]:
    """The operator behind a kernel and its arguments, with the epilogue that `Kernel.run` does not reach."""
    if packed.pattern.is_nm:
        op = torch.ops.sparse_engine.cuda_nm_linear.default
        return op, (x, layout["weight"], bias, residual, *packed.shape, packed.pattern.group[1], relu)
    op = torch.ops.sparse_engine.cuda_unstructured_linear.default
    return op, (x, layout["weight"], layout["offsets"], bias, residual, *layout["extent"].shape[:4], relu)


@pytest.mark.parametrize(("pattern", "shape"), CASES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_layout_gives_back_the_packed_weight(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = make_packed(pattern, shape, dtype)
    kernel = registry.get(KERNEL_OF[pattern])
    described = PackedWeight(packed.format, packed.version, packed.pattern, packed.shape, packed.dtype, {})
    recovered = kernel.recover(kernel.prepare(packed), described)
    assert recovered.tensors.keys() == packed.tensors.keys()
    for name, tensor in packed.tensors.items():
        assert recovered.tensors[name].dtype is tensor.dtype
        assert torch.equal(recovered.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_fragments_hold_every_byte_of_an_unpadded_weight_once() -> None:
    packed = make_packed("4:8", (32, 512), torch.bfloat16)
    fragments = cuda_nm.to_fragments(packed.tensors["values"], packed.tensors["bitmask"], packed.shape, 8)
    assert fragments.numel() == packed.nbytes
    assert torch.equal(fragments[:, :, 0].flatten().sort().values, packed.tensors["bitmask"].flatten().sort().values)


def test_words_of_an_octet_are_filled_from_the_front() -> None:
    for byte in range(256):
        for parity in range(2):
            places, length = cuda_unstructured.octet_places(byte, parity)
            taken = sorted(place for place in places if place >= 0)
            assert [place >= 0 for place in places] == [bool(byte >> column & 1) for column in range(8)]
            # No half-word is skipped, but for the free half that pairs which keep both columns cannot fill.
            first = parity + length - len(taken)
            assert taken == list(range(first, first + len(taken)))
            assert first == parity or (parity == 1 and taken[:1] == [2])
            # One word serves a pair, which is all that a lane loads for it.
            for pair in range(4):
                if byte >> 2 * pair & 3 == 3:
                    assert places[2 * pair] // 2 == places[2 * pair + 1] // 2


@pytest.mark.parametrize(("density", "parts"), [(0.5, 1), (0.5, 2), (0.05, 1), (1.0, 2)])
def test_a_lane_that_walks_its_streams_meets_its_values(density: float, parts: int) -> None:
    """What the kernels do with a unit, from its bytes alone."""
    generator = torch.Generator().manual_seed(0)
    shape = (32, 512)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16) * (torch.rand(shape, generator=generator) < density)
    packed = formats.for_pattern(SparsityPattern.parse("0.5")).pack(weight, Mask(SparsityPattern.parse("0.5"), weight != 0))
    words, streams = cuda_unstructured.to_streams(packed.tensors["values"], packed.tensors["bitmask"], shape, parts)
    block, header, found = words.view(torch.uint8), 512 // parts, torch.zeros_like(weight)
    for number, (start, end) in enumerate(itertools.pairwise(streams.offsets.tolist())):
        depth = ((end - start) * 16 - header - 32) // 128
        assert depth <= streams.depth
        assert end * 16 <= block.numel()
        tile, unit = divmod(number, 2 * parts)
        values = words[start * 8 + (header + 32) // 2 : end * 8].view(depth, 32, 2)
        columns = block[start * 16 + header : start * 16 + header + 32].tolist()
        assert sorted(columns) == list(range(32))
        for lane, stream in itertools.product(range(32), range(2)):
            column, position = (columns[lane] if stream else lane), 0
            for step in range(8 // parts):
                byte = int(block[start * 16 + lane * (16 // parts) + 2 * step + stream])
                places, length = cuda_unstructured.octet_places(byte, position % 2)
                for offset, place in enumerate(places):
                    if place >= 0:
                        word, half = divmod(position // 2 * 2 + place, 2)
                        row = tile * 16 + lane // 4 + 8 * stream
                        value = values[depth - 1 - word, column, 1 - half] if stream else values[word, column, half]
                        found[row, unit * (256 // parts) + step * 32 + lane % 4 * 8 + offset] = value
                position += length
    assert torch.equal(found, weight)


def test_sparse_metadata_names_the_kept_positions() -> None:
    # Mask byte: group 0 keeps columns 1 and 2, group 1 keeps 0 and 3.
    assert int(cuda_nm.metadata_table(torch.device("cpu"))[0b1001_0110]) == (1 | 2 << 2) | (0 | 3 << 2) << 4


def test_parameters_match_the_source() -> None:
    header = (cuda.source_folder() / "include" / "decode_common.cuh").read_text()
    body = re.search(r"struct Params \{(.*?)\};", header, re.S)
    assert body is not None
    declared = [name for line in re.sub(r"//.*", "", body[1]).split(";") for name in re.findall(r"[*\s](\w+)\s*(?:,|$)", line.strip())]
    assert declared == [name for name, _ in cuda_decode.Params._fields_]


KERNEL_NAMES = {"2:4": "cuda_nm", "4:8": "cuda_nm", "unstructured": "cuda_unstructured"}
COMPILED = list(
    dict.fromkeys(
        cuda_tiles.choose(KERNEL_NAMES[pattern], pattern, torch.bfloat16, *shape, m, H200)
        for pattern in ("2:4", "4:8", "unstructured")
        for shape in ((768, 768), (16384, 4096))
        for m in (1, 16, 64, 128)
    )
)


STREAMED = [
    (source, cuda_tiles._streamed_tiles(source, 16384, 4096, m, H200)[at])
    for source in (cuda_tiles.STREAMED_24, cuda_tiles.STREAMED_48, cuda_tiles.STREAMED_UNSTRUCTURED)
    for m, at in ((32, 0), (64, -1), (128, 0))
]


@pytest.mark.parametrize(("source", "tile"), [*COMPILED, *STREAMED], ids=str)
def test_chosen_tiles_compile_within_their_registers(source: cuda_decode.Source, tile: cuda_decode.Tile, tmp_path: Path) -> None:
    said = nvcc("90a", source.file, dict(cuda_decode.macros_of(source, tile, torch.bfloat16)), tmp_path)
    spills = re.search(r"(\d+) bytes spill stores", said)
    assert spills is not None
    # A few registers of a prologue may spill where the tile was measured as the fastest all the same; accumulators may not.
    assert int(spills[1]) <= 64
    assert "serialized" not in said


def test_activations_are_arranged_for_every_wgmma_kernel(tmp_path: Path) -> None:
    for source, tile in COMPILED:
        if isinstance(source, cuda_decode.WarpgroupSource) and source.arranged:
            nvcc("90a", "arrange.cu", dict(cuda_decode.arrange_macros(source, tile)), tmp_path)


@pytest.mark.parametrize("pattern", list(KERNEL_NAMES))
def test_kernels_on_mma_compile_for_ampere(pattern: str, tmp_path: Path) -> None:
    source, tile = cuda_tiles.choose(KERNEL_NAMES[pattern], pattern, torch.float16, 4096, 4096, 8, A100)
    assert not isinstance(source, cuda_decode.WarpgroupSource)
    nvcc("80", source.file, dict(cuda_decode.macros_of(source, tile, torch.float16)), tmp_path)


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 64, 128])
@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (1, 8), (2048, 2048), (36864, 9216), (9216, 36864)], ids=str)
def test_chosen_tiles_fit_the_gpu(shape: tuple[int, int], m: int) -> None:
    # The same GPU by a name that no table has: there a rule chooses.
    names, layouts = (H200.name, "GPU without a table"), (("2:4", 0), ("4:8", 0), ("unstructured", 64))
    for name, (pattern, depth) in itertools.product(names, layouts):
        source, tile = cuda_tiles.choose(KERNEL_NAMES[pattern], pattern, torch.bfloat16, *shape, m, replace(H200, name=name))
        count = min(m, source.max_rows)
        tile = cuda_decode.fit(source, tile, count, depth, H200)
        assert count <= 8 * tile.n_tiles
        assert source.shared_bytes(tile, count, depth) <= H200.shared_limit
        assert 32 <= source.threads(tile) <= 1024
        assert tile.splits <= 8
        assert tile.warps_k % tile.parts == 0 or depth


@pytest.mark.parametrize("pattern", list(KERNEL_NAMES))
def test_clusters_that_share_activations_fit_the_gpu_at_once(pattern: str) -> None:
    for shape, m in itertools.product(((768, 768), (1024, 4096), (16384, 4096), (9216, 36864)), (5, 32, 128)):
        for config in cuda_tiles.configs(pattern, problem_of(pattern, shape, m), H200):
            source, tile = cuda_tiles.parse(pattern, config) or pytest.fail(f"{config} is not understood")
            if isinstance(source, cuda_decode.StreamedSource):
                units = -(-shape[1] * tile.parts // cuda_decode.UNIT)
                blocks, _ = source.grid(tile, shape[0], units, source.shared_bytes(tile, m, 42 if pattern == "unstructured" else 0), H200)
                assert blocks % tile.cluster == 0
                assert tile.cluster <= blocks <= H200.processors * tile.min_blocks
                # No range is empty.
                assert blocks // tile.cluster <= -(-shape[0] // (tile.block_rows * tile.cluster)) * units


def test_tuning_begins_with_what_dispatch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(problem_of("2:4", (16384, 4096), 64), gpu=H200.name)
    configs = cuda_tiles.configs("2:4", problem, H200)
    for held in (configs[3], configs[3][:-1]):
        monkeypatch.setattr(tune.tuning, "lookup", lambda *_, held=held: {"cuda_nm": Measured(1.0, held)})
        assert tune._held(registry.get("cuda_nm"), problem, configs) == [configs[3]]
    monkeypatch.setattr(tune.tuning, "lookup", lambda *_: {})
    assert tune._held(registry.get("cuda_nm"), problem, configs) == []


def test_tables_without_the_last_field_are_understood() -> None:
    old = ("decode_wgmma.cu", 8, 1, 8, 1, 1, 1, 2, 1, 16)
    assert cuda_tiles.parse("2:4", old) == (cuda_tiles.WGMMA_24, cuda_decode.Tile(8, 1, 8, 1, 1, 1, 2, 1, 16, 1))
    assert cuda_tiles.parse("2:4", old[:-1]) is None


def test_missing_gpu_is_a_reason_and_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    layer = SparseLinear.from_packed(make_packed("2:4", (32, 256), torch.bfloat16), backend="cuda_nm")
    with pytest.raises(KernelUnavailableError, match="runs on cuda, not cpu"):
        layer(torch.zeros(1, 256, dtype=torch.bfloat16))
    assert cuda.why_unavailable() == "needs a CUDA device and torch sees none"


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 7, 8, 9, 16, 17, 33, 64, 65, 129])
@pytest.mark.parametrize(("pattern", "shape"), CASES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_product_matches_fp64(pattern: str, shape: tuple[int, int], dtype: torch.dtype, m: int) -> None:
    packed = make_packed(pattern, shape, dtype, "cuda", seed=m)
    kernel = registry.get(KERNEL_OF[pattern])
    layout = kernel.prepare(packed)
    x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
    for bias in (None, torch.randn(shape[0], device="cuda", dtype=dtype)):
        # Freed memory full of NaN is what the allocator hands out next: an element never written shows.
        torch.full((m, shape[0]), float("nan"), device="cuda", dtype=dtype)
        y = kernel.run(x, layout, bias, packed.pattern)
        assert y.shape == (m, shape[0])
        assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("cluster", "splits"), list(itertools.product((1, 2, 4), (0, 1, 3))))
@pytest.mark.parametrize(("pattern", "shape"), [("2:4", (600, 2052)), ("4:8", (330, 4104)), ("0.5", (601, 2050)), ("0.5", (200, 1000))])
def test_row_groups_are_cut_among_clusters(pattern: str, shape: tuple[int, int], cluster: int, splits: int) -> None:
    """Sums meet whether a cluster's range is a part of a row group or parts of two; calls in a row reuse the workspace."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    packed = make_packed(pattern, shape, torch.bfloat16, "cuda")
    kernel = registry.get(KERNEL_OF[pattern])
    layout = kernel.prepare(packed)
    bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
    parts = cuda_tiles.unstructured_parts(shape[1]) if pattern == "0.5" else 1
    for m, n_tiles, warps, copies in ((5, 1, 4, 16), (40, 8, 8, 8), (128, 16, 4, 8)):
        config = ("decode_stream.cu", n_tiles, 1, warps, 1, parts, splits, 2, 1, copies, cluster)
        for offset in (0, 8, 1):
            # Rows that are aligned, and rows that are not.
            x = torch.randn(m, shape[1] + 8, device="cuda", dtype=torch.bfloat16)[:, offset : offset + shape[1]]
            torch.full((m, shape[0]), float("nan"), device="cuda", dtype=torch.bfloat16)
            y = kernel.run_config(x, layout, bias, packed.pattern, config)
            assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize(("warps_row", "warps_k", "blocks"), [(1, 2, 1), (2, 4, 1), (1, 3, 2)])
@pytest.mark.parametrize("shape", [(9000, 600), (9000, 1100), (5003, 2050)], ids=str)
def test_blocks_stay_for_several_row_groups(shape: tuple[int, int], warps_row: int, warps_k: int, blocks: int) -> None:
    packed = make_packed("0.5", shape, torch.bfloat16, "cuda")
    kernel = registry.get("cuda_unstructured")
    layout = kernel.prepare(packed)
    for m, n_tiles in ((1, 1), (5, 1), (16, 2)):
        config = ("decode_unstructured.cu", n_tiles, 1, warps_row, warps_k, cuda_tiles.unstructured_parts(shape[1]), 1, 2, blocks, 4, 1)
        x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
        torch.full((m, shape[0]), float("nan"), device="cuda", dtype=torch.bfloat16)
        y = kernel.run_config(x, layout, None, packed.pattern, config)
        assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize(("warps_row", "warps_k"), [(4, 1), (4, 2), (4, 3), (8, 2)])
@pytest.mark.parametrize(
    ("pattern", "shape"), [("2:4", (600, 2052)), ("4:8", (330, 4104)), ("4:8", (72, 264)), ("0.5", (601, 2050)), ("0.5", (200, 1000))]
)
def test_warpgroups_share_the_columns(pattern: str, shape: tuple[int, int], warps_row: int, warps_k: int) -> None:
    """Also where they are more than a block's units."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")
    packed = make_packed(pattern, shape, torch.bfloat16, "cuda")
    kernel = registry.get(KERNEL_OF[pattern])
    layout = kernel.prepare(packed)
    bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
    parts = cuda_tiles.unstructured_parts(shape[1]) if pattern == "0.5" else 1
    for (m, n_tiles), splits in itertools.product(((5, 1), (17, 4), (64, 8), (127, 16)), (1, 2, 3)):
        if warps_row * warps_k > 12 and n_tiles > 4:
            continue
        config = ("decode_wgmma.cu", n_tiles, 1, warps_row, warps_k, parts, splits, 2, 1, 4, 1)
        assert cuda_tiles.parse({"0.5": "unstructured"}.get(pattern, pattern), config) is not None
        for offset in (0, 1):
            x = torch.randn(m, shape[1] + 8, device="cuda", dtype=torch.bfloat16)[:, offset : offset + shape[1]]
            torch.full((m, shape[0]), float("nan"), device="cuda", dtype=torch.bfloat16)
            y = kernel.run_config(x, layout, bias, packed.pattern, config)
            assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_strided_and_unaligned_activations(pattern: str) -> None:
    packed = make_packed(pattern, (48, 776), torch.bfloat16, "cuda")
    kernel = registry.get(KERNEL_OF[pattern])
    layout = kernel.prepare(packed)
    wide = torch.randn(6, 1601, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, :776], wide[:, 1:777], wide[:, :1552:2], wide[::2, 8:784], wide[:, :776].reshape(2, 3, 776)):
        y = kernel.run(x, layout, None, packed.pattern)
        assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[torch.bfloat16]


def tiles_of_every_source(pattern: str, parts: int) -> list[tuple[cuda_decode.Source, cuda_decode.Tile, int]]:
    """A tile for each kernel of a pattern, and activation rows that it takes, not a multiple of its n-tiles."""
    found = []
    for source in cuda_tiles.sources(pattern, cuda_tiles.current_gpu()):
        if isinstance(source, cuda_decode.WarpgroupSource):
            found += [(source, cuda_decode.Tile(n, 1, 4, 1, parts, 1, 2, 1, 4), m) for n, m in ((4, 31), (16, 101))]
        else:
            found += [(source, cuda_decode.Tile(n, 1, 1, 2, parts, 1, 2, 1, 4), m) for n, m in ((1, 5), (2, 11))]
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(80, 512), (83, 1048)], ids=str)
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_epilogue_of_every_kernel(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Bias, ReLU and residual in any combination, with rows of y that are aligned or not."""
    packed = make_packed(pattern, shape, dtype, "cuda")
    layout = registry.get(KERNEL_OF[pattern]).prepare(packed)
    named = pattern if packed.pattern.is_nm else "unstructured"
    streams = None if packed.pattern.is_nm else cuda_unstructured.streams_of(layout)
    for source, tile, m in tiles_of_every_source(named, streams.parts if streams else 1):
        x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
        given = (torch.randn(shape[0], device="cuda", dtype=dtype), torch.randn(m, shape[0], device="cuda", dtype=dtype))
        for bias, residual, relu in itertools.product((None, given[0]), (None, given[1]), (False, True)):
            torch.full((m, shape[0]), float("nan"), device="cuda", dtype=dtype)
            chosen = (source, tile)
            y = cuda_decode.run_decode(lambda *_, chosen=chosen: chosen, x, layout["weight"], bias, residual, *shape, relu, streams)
            expected = expected_product(x, packed, bias)
            expected = expected.clamp_min(0) if relu else expected
            assert relative_error(y, expected if residual is None else expected + residual.double()) < TOLERANCE[dtype], (source, m)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_epilogue_of_the_operator(pattern: str) -> None:
    packed = make_packed(pattern, (80, 512), torch.float16, "cuda")
    layout = registry.get(KERNEL_OF[pattern]).prepare(packed)
    for m in (5, 40):
        x = torch.randn(m, 512, device="cuda", dtype=torch.float16)
        bias, residual = (torch.randn(*size, device="cuda", dtype=torch.float16) for size in ((80,), (m, 80)))
        op, arguments = op_call(x, layout, packed, bias, residual, relu=True)
        expected = expected_product(x, packed, bias).clamp_min(0) + residual.double()
        assert relative_error(op(*arguments), expected) < TOLERANCE[torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1024, 1040])
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_product_on_a_device_that_is_not_the_current_one(pattern: str, columns: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    packed = make_packed(pattern, (200, columns), torch.bfloat16, "cuda:1")
    kernel = registry.get(KERNEL_OF[pattern])
    layout = kernel.prepare(packed)
    for m in (1, 40):
        x = torch.randn(m, columns, device="cuda:1", dtype=torch.bfloat16)
        y = kernel.run(x, layout, None, packed.pattern)
        assert y.device == x.device
        assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_graph_and_side_stream(pattern: str) -> None:
    packed = make_packed(pattern, (256, 1024), torch.bfloat16, "cuda")
    kernel = registry.get(KERNEL_OF[pattern])
    layout = kernel.prepare(packed)
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 1024, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        side = kernel.run(x, layout, bias, packed.pattern)
    torch.cuda.current_stream().wait_stream(stream)
    assert relative_error(side, expected_product(x, packed, bias)) < TOLERANCE[torch.bfloat16]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # A chain, so that a kernel reading its input before its predecessor wrote it shows.
        h = x * 2
        for _ in range(4):
            y = kernel.run(h, layout, bias, packed.pattern)
            h = torch.tanh(y).repeat(1, 4)
        z = kernel.run(h, layout, bias, packed.pattern)
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(2, 1024))
        z.fill_(float("nan"))
        graph.replay()
        assert relative_error(z, expected_product(h, packed, bias)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_chained_kernels_without_anything_between() -> None:
    packed = make_packed("4:8", (512, 512), torch.float16, "cuda")
    kernel = registry.get("cuda_nm")
    layout = kernel.prepare(packed)
    for trial in range(20):
        torch.manual_seed(trial)
        steps = [torch.randn(1, 512, device="cuda", dtype=torch.float16) * 1e-3]
        for _ in range(3):
            steps.append(kernel.run(steps[-1], layout, None, packed.pattern))
        for before, after in itertools.pairwise(steps):
            assert relative_error(after, expected_product(before, packed, None)) < TOLERANCE[torch.float16]


@pytest.mark.gpu
def test_wrong_arguments_are_refused() -> None:
    packed = make_packed("2:4", (32, 256), torch.bfloat16, "cuda")
    kernel = registry.get("cuda_nm")
    layout = kernel.prepare(packed)
    with pytest.raises(InputError, match="cast x to the weight's type"):
        kernel.run(torch.zeros(1, 256, device="cuda", dtype=torch.float16), layout, None, packed.pattern)
    with pytest.raises(InputError, match="x has 128 columns"):
        kernel.run(torch.zeros(1, 128, device="cuda", dtype=torch.bfloat16), layout, None, packed.pattern)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_operator_registration(pattern: str) -> None:
    packed = make_packed(pattern, (32, 256), torch.bfloat16, "cuda")
    layout = registry.get(KERNEL_OF[pattern]).prepare(packed)
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(*op_call(x, layout, packed, None, None, relu=False))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", list(SHAPES))
def test_sparse_linear_runs_and_gives_its_weight_back(pattern: str) -> None:
    packed = make_packed(pattern, (64, 512), torch.bfloat16, "cuda")
    layer = SparseLinear.from_packed(packed, backend=KERNEL_OF[pattern])
    x = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16)
    expected = expected_product(x, packed, None)
    kept = {name: tensor.clone() for name, tensor in packed.tensors.items()}
    assert relative_error(layer(x), expected) < TOLERANCE[torch.bfloat16]
    for name, tensor in layer.packed.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), kept[name].view(torch.uint8))
