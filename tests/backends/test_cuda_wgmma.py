"""The 2:4 decode kernel on wgmma, whose activations tensor copies bring: every form, over awkward shapes and activations (on a GPU)."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from cuda_products import H200, TOLERANCE, make_packed, nvcc
from products import expected_product, relative_error
from torch import Tensor

from sparse_engine import cuda, registry
from sparse_engine.backends import cuda_decode, cuda_tiles
from sparse_engine.backends.cuda_decode import Tile
from sparse_engine.backends.cuda_tiles import WGMMA_24
from sparse_engine.formats.base import PackedWeight

FORMS = cuda_tiles._WARPGROUPS["nm"]
ROWS = {1: (1, 7), 2: (9, 16), 4: (3, 17, 31), 8: (33, 64), 16: (5, 65, 101, 127, 128)}
"""Activation rows by n-tiles."""


def tile_of(n_tiles: int, form: tuple[int, int, int, int], splits: int = 1, cluster: int = 1) -> Tile:
    warps_row, warps_k, slots, blocks = form
    return Tile(n_tiles, 1, warps_row, warps_k, 1, splits, slots, blocks, 16, cluster)


def fits(tile: Tile) -> bool:
    return WGMMA_24.shared_bytes(tile, 8 * tile.n_tiles, 0) <= H200.shared_limit


def test_the_image_is_made_for_other_patterns_only() -> None:
    assert not WGMMA_24.arranged
    others = (cuda_tiles.WGMMA_48, cuda_tiles.WGMMA_UNSTRUCTURED, cuda_tiles.STREAMED_24, cuda_tiles.STREAMED_48)
    assert all(source.arranged for source in others)


def test_what_a_tensor_map_cannot_describe_is_copied() -> None:
    wide = torch.arange(6 * 1601, dtype=torch.float32).view(6, 1601).to(torch.bfloat16)
    aligned = torch.zeros(6, 784, dtype=torch.bfloat16)
    assert cuda.describable(aligned[:, 8:780]).data_ptr() == aligned[:, 8:].data_ptr()
    for x in (wide[:, :776], aligned[:, 1:773], aligned[:, ::2], wide[::2, 8:783], wide[:1].expand(4, -1), wide[:3, :4]):
        y = cuda.describable(x)
        assert y.data_ptr() % 16 == 0
        assert y.stride(1) == 1
        assert y.stride(0) % 8 == 0
        assert y.stride(0) >= y.shape[1] >= x.shape[1]
        assert torch.equal(y[:, : x.shape[1]], x)
        assert not y[:, x.shape[1] :].any()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("n_tiles", "cluster"), [(2, 1), (16, 1), (8, 2), (16, 4)])
def test_forms_compile_within_their_registers(n_tiles: int, cluster: int, form: tuple[int, int, int, int], tmp_path: Path) -> None:
    said = nvcc("90a", WGMMA_24.file, dict(cuda_decode.macros_of(WGMMA_24, tile_of(n_tiles, form, 1, cluster), torch.bfloat16)), tmp_path)
    assert "0 bytes spill stores" in said
    assert "serialized" not in said
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None
    assert int(registers[1]) * WGMMA_24.threads(tile_of(n_tiles, form)) * form[3] <= 65536


def run(
    tile: Tile, packed: PackedWeight, weight: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool = False
) -> Tensor:
    return cuda_decode.run_decode(lambda *_: (WGMMA_24, tile), x, weight, bias, residual, *packed.shape, relu)


def product(
    tile: Tile,
    packed: PackedWeight,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    # Freed memory full of NaN is what the allocator hands out next: an element never written shows.
    torch.full((*x.shape[:-1], packed.shape[0]), float("nan"), device="cuda", dtype=x.dtype)
    return run(tile, packed, weight, x, bias, residual, relu)


def skip_elsewhere() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("n_tiles", list(ROWS))
def test_every_form_matches_fp64(n_tiles: int, form: tuple[int, int, int, int], cluster: int) -> None:
    skip_elsewhere()
    if n_tiles % cluster or not fits(tile_of(n_tiles, form)):
        pytest.skip("there is no such form")
    for shape in ((1, 4), (33, 260), (200, 1028), (600, 2052)):
        packed = make_packed("2:4", shape, torch.bfloat16, "cuda")
        weight = registry.get("cuda_nm").prepare(packed)["weight"]
        bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
        for m, splits in itertools.product(ROWS[n_tiles], (1, 2, 3, 5, 8)):
            if splits * cluster > 8:
                continue
            x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
            y = product(tile_of(n_tiles, form, splits, cluster), packed, weight, x, bias)
            assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[torch.bfloat16], (shape, m, splits)


TILES = [
    *(tile_of(2, FORMS[3]), tile_of(4, FORMS[3], 2), tile_of(8, FORMS[0], 2), tile_of(8, FORMS[0], 2, 2), tile_of(16, FORMS[1], 3)),
    *(tile_of(16, FORMS[2], 4), tile_of(16, FORMS[1], 4, 2), tile_of(8, FORMS[4], 1, 2)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_epilogue(dtype: torch.dtype, tile: Tile) -> None:
    """Bias, ReLU and residual in any combination, with rows of y that are aligned or not."""
    skip_elsewhere()
    for shape in ((264, 1024), (77, 1024), (203, 2052)):
        packed = make_packed("2:4", shape, dtype, "cuda")
        weight = registry.get("cuda_nm").prepare(packed)["weight"]
        m = 8 * tile.n_tiles - 1
        x = torch.randn(m, shape[1], device="cuda", dtype=dtype)
        given = (torch.randn(shape[0], device="cuda", dtype=dtype), torch.randn(m, shape[0], device="cuda", dtype=dtype))
        for bias, residual, relu in itertools.product((None, given[0]), (None, given[1]), (False, True)):
            expected = expected_product(x, packed, bias)
            expected = expected.clamp_min(0) if relu else expected
            expected = expected if residual is None else expected + residual.double()
            assert relative_error(product(tile, packed, weight, x, bias, residual, relu), expected) < TOLERANCE[dtype], shape


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_strided_and_unaligned_activations(tile: Tile) -> None:
    """Also more rows than one launch takes, and what lies around x must not reach the product."""
    skip_elsewhere()
    packed = make_packed("2:4", (136, 772), torch.bfloat16, "cuda")
    weight = registry.get("cuda_nm").prepare(packed)["weight"]
    m = 8 * tile.n_tiles
    wide = torch.full((2 * m + 6, 1648), float("nan"), device="cuda", dtype=torch.bfloat16)
    for view in (
        *(wide[3 : m + 3, 8:780], wide[: m - 1, 1:773], wide[:m, :1544:2], wide[: 2 * m : 2, 16:788], wide[: m - 2, :772]),
        wide[:m, :772].unflatten(0, (2, m // 2)),
    ):
        wide.fill_(float("nan"))
        view.copy_(torch.randn(view.shape))
        assert relative_error(product(tile, packed, weight, view), expected_product(view, packed, None)) < TOLERANCE[torch.bfloat16]
    if tile.n_tiles == 16:
        x = torch.randn(300, 772, device="cuda", dtype=torch.bfloat16)
        assert relative_error(product(tile, packed, weight, x), expected_product(x, packed, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_chain_in_a_graph(tile: Tile) -> None:
    skip_elsewhere()
    packed = make_packed("2:4", (2048, 2048), torch.bfloat16, "cuda")
    weight = registry.get("cuda_nm").prepare(packed)["weight"]
    m = 8 * tile.n_tiles - 1
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    product(tile, packed, weight, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Nothing between, so that a kernel reading its input before its predecessor wrote it shows.
        steps = [x]
        for _ in range(4):
            steps.append(run(tile, packed, weight, steps[-1], None, steps[-1]))
    for seed in range(5):
        torch.manual_seed(seed)
        x.copy_(torch.randn(m, 2048) * 0.01)
        for step in steps[1:]:
            step.fill_(float("nan"))
        graph.replay()
        for before, after in itertools.pairwise(steps):
            assert relative_error(after, expected_product(before, packed, None) + before.double()) < TOLERANCE[torch.bfloat16]
