"""The CUDA prefill kernels: tiles compile within their registers (where nvcc is); products, epilogues and graphs (on a GPU)."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path

import pytest
import torch
from cuda_products import H200, TOLERANCE, make_packed, nvcc
from products import expected_product, relative_error

from sparse_engine import cuda, registry
from sparse_engine.backends.cuda_nm_8bit import SOURCES
from sparse_engine.backends.cuda_prefill import Call, wgmma
from sparse_engine.backends.cuda_prefill.nm import PREFILL_24, SparseWgmmaForm
from sparse_engine.backends.cuda_prefill.wgmma import PrefillSource, PrefillTile, run_prefill, tile_of
from sparse_engine.errors import KernelUnavailableError

TILES = [
    *SparseWgmmaForm.tiles,
    PrefillTile(16, 2, 2, 4, cluster=2, batch=2),
    PrefillTile(16, 2, 2, 4, cluster=2, splits=2),
]


def test_parameters_match_the_source() -> None:
    header = (cuda.source_folder() / "include" / "prefill_common.cuh").read_text()
    body = re.search(r"Params \{(.*?)\};", header, re.S)
    assert body is not None
    lines = [line.strip() for line in re.sub(r"//.*", "", body[1]).split(";")]
    declared = [name for line in lines for name in re.findall(r"[*\s](\w+)(?:\[16\])?\s*(?:,|$)", line)]
    assert [*declared, "padding"] == [name for name, *_ in wgmma._Params._fields_]
    assert ctypes.sizeof(wgmma._Params) % 64 == 0


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_compile_within_their_registers(tile: PrefillTile, tmp_path: Path) -> None:
    said = nvcc("90a", PREFILL_24.file, dict(PREFILL_24.all_macros(tile, torch.bfloat16)), tmp_path)
    spills = re.search(r"(\d+) bytes spill stores", said)
    assert spills is not None
    assert int(spills[1]) <= 32
    assert "serialized" not in said


@pytest.mark.parametrize("source", [PREFILL_24, SOURCES[torch.int8]], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("tile", SparseWgmmaForm.tiles, ids=str)
def test_chunks_of_sums_leave_in_whole_turns(tile: PrefillTile, source: PrefillSource) -> None:
    chunks, leaving = tile.tokens // 32, source.leaving(tile)
    assert chunks % leaving == 0
    assert 1 <= leaving <= source.stores(tile)
    assert leaving * 32 <= 256, "a tensor copy's box has no more rows"
    macros = dict(source.all_macros(tile, torch.bfloat16))
    assert (macros["STORES"], macros["LEAVING"]) == (source.stores(tile), leaving)


def test_configurations_name_their_tiles() -> None:
    form = SparseWgmmaForm()
    for rows, columns, m in ((768, 768, 1024), (4096, 4096, 256), (9216, 36864, 8192)):
        configs = form.configs("2:4", rows, columns, m, H200)
        tiles = [tile_of(config) for config in configs]
        assert set(tiles) <= set(form.tiles)
        assert all(PREFILL_24.fits(tile, H200) for tile in tiles)
    with pytest.raises(KernelUnavailableError, match="no configuration"):
        tile_of(("wgmma-sparse", 1))


def product(tile: PrefillTile, packed, x, bias=None, residual=None, relu=False):  # type: ignore[no-untyped-def]
    weight = registry.get("cuda_nm").prepare(packed)["weight"]
    return run_prefill(PREFILL_24, tile, Call("2:4", x, weight, bias, residual, *packed.shape, relu))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(200, 1028), (1, 1024), (520, 2048)], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_product_matches_fp64(shape: tuple[int, int], dtype: torch.dtype, tile: PrefillTile) -> None:
    packed = make_packed("2:4", shape, dtype, "cuda")
    for m in (1, 129, 777):
        x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype) if m % 2 else None
        # Freed memory full of NaN is what the allocator hands out next: an element never written shows.
        torch.full((m, shape[0]), float("nan"), device="cuda", dtype=dtype)
        y = product(tile, packed, x, bias)
        assert y.shape == (m, shape[0])
        assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[dtype], m


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("rows", [264, 77])
def test_epilogue(rows: int, tile: PrefillTile) -> None:
    packed = make_packed("2:4", (rows, 1024), torch.float16, "cuda")
    x = torch.randn(301, 1024, device="cuda", dtype=torch.float16)
    bias, residual = (torch.randn(*size, device="cuda", dtype=torch.float16) for size in ((rows,), (301, rows)))
    y = product(tile, packed, x, bias, residual, relu=True)
    expected = expected_product(x, packed, bias).clamp_min(0) + residual.double()
    assert relative_error(y, expected) < TOLERANCE[torch.float16]
    assert relative_error(product(tile, packed, x, None, residual), expected_product(x, packed, None) + residual.double()) < 2e-3


@pytest.mark.gpu
def test_strided_and_unaligned_activations() -> None:
    packed = make_packed("2:4", (136, 772), torch.bfloat16, "cuda")
    wide = torch.randn(300, 1648, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, :772], wide[:, 8:780], wide[:, 1:773], wide[:, :1544:2], wide[::2, 8:780], wide[:, :772].reshape(2, 150, 772)):
        y = product(TILES[0], packed, x)
        assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [*TILES[:7], *(tile for tile in TILES if tile.splits == 0)], ids=str)
def test_chain_in_a_graph(tile: PrefillTile) -> None:
    packed = make_packed("2:4", (1024, 1024), torch.bfloat16, "cuda")
    x = torch.randn(600, 1024, device="cuda", dtype=torch.bfloat16)
    product(tile, packed, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Nothing between, so that a kernel reading its input before its predecessor wrote it shows.
        steps = [x]
        for _ in range(3):
            steps.append(product(tile, packed, steps[-1], None, steps[-1]))
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(600, 1024) * 0.01)
        graph.replay()
        for before, after in itertools.pairwise(steps):
            assert relative_error(after, expected_product(before, packed, None) + before.double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_a_tile_without_a_form_is_refused() -> None:
    packed = make_packed("2:4", (64, 256), torch.bfloat16, "cuda")
    with pytest.raises(KernelUnavailableError, match="has no form"):
        product(PrefillTile(16, 2, 2, 4, splits=2), packed, torch.zeros(300, 256, device="cuda", dtype=torch.bfloat16))
