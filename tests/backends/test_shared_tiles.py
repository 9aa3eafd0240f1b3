"""Tiles that clusters share (csrc/cuda/include/prefill_ranges.cuh), in every prefill kernel that has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_products import H200, make_packed, nvcc
from products import expected_product, random_keep, relative_error
from torch import Tensor

from sparse_engine import formats, registry
from sparse_engine.backends import cuda_nm_8bit
from sparse_engine.backends.cuda_levels import quantise_rows
from sparse_engine.backends.cuda_prefill import shared_tiles
from sparse_engine.backends.cuda_prefill.expanded import NMForm, UnstructuredForm
from sparse_engine.backends.cuda_prefill.nm import SparseWgmmaForm
from sparse_engine.backends.cuda_prefill.wgmma import PrefillSource, PrefillTile
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

BF16 = torch.bfloat16
SOURCES: Mapping[str, tuple[tuple[PrefillTile, ...], PrefillSource]] = {
    "2:4": (SparseWgmmaForm.tiles, SparseWgmmaForm.source),
    "4:8": (NMForm.tiles, NMForm.source),
    "unstructured": (UnstructuredForm.tiles, UnstructuredForm.source),
    "int8": (cuda_nm_8bit.TILES, cuda_nm_8bit.SOURCES[torch.int8]),
    "fp8": (cuda_nm_8bit.TILES, cuda_nm_8bit.SOURCES[torch.float8_e4m3fn]),
}
CASES = [(kind, tile) for kind, (tiles, _) in SOURCES.items() for tile in tiles if tile.splits == 0]
NAMES = {"2:4": "wgmma-sparse", "4:8": "wgmma-4:8", "unstructured": "wgmma-unstructured"}


def test_rounds_that_are_not_whole_are_shared() -> None:
    tile = PrefillTile(32, 1, 2, 5, 2, splits=0)
    assert tile.clusters(H200) == 66
    assert (tile.tiles(5120, 1024), tile.shares(5120, 1024, H200)) == (80, True)
    assert (tile.tiles(66 * 256, 256), tile.shares(66 * 256, 256, H200)) == (66, False), "one round, and nothing behind it"
    assert not PrefillTile(32, 1, 2, 5, 2).shares(5120, 1024, H200)
    whole, shared = (PrefillTile(32, 1, 2, 5, 2, splits=splits).clocks(5120, 1024, H200, 1e5, 1e3) for splits in (1, 0))
    assert whole == 2 * (1e5 + 1e3)
    assert shared == pytest.approx(80 / 66 * 1e5 + 2 * 1e3)


class Place:
    """Stands for where launches go: a stream, which may be captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda_stream, self.captured = 1, False
        self.flags = shared_tiles._Flags(torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.captured)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(shared_tiles, "_of_device", lambda index: self.flags)

    def synchronize(self) -> None: ...

    def launch(self, stream: int, *, captured: bool = False) -> int:
        self.cuda_stream, self.captured = stream, captured
        found = shared_tiles.flags()
        assert not found.any()
        return found.data_ptr()


def test_who_may_run_at_the_same_time_has_flags_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)
    eager = [place.launch(1), place.launch(2)]
    assert len(set(eager)) == 2
    assert [place.launch(1), place.launch(2)] == eager, "launches of a stream come one behind the other"
    alone = [place.launch(1, captured=True) for _ in range(2)]
    assert len({*eager, *alone}) == 4, "nobody knows what a captured launch runs beside"
    spare = len(place.flags.spare)

    class Graph: ...

    graphs, taken = [Graph(), Graph()], []
    for graph in graphs:
        with shared_tiles.flags_of(graph):
            taken.append([place.launch(stream, captured=True) for stream in (1, 1, 3)])
    for one, two, other in taken:
        assert one == two != other
    assert len({*eager, *alone, *taken[0], *taken[1]}) == 8
    assert len(place.flags.spare) == spare - 4
    graphs.clear()
    del graph
    assert len(place.flags.spare) == spare, "a graph that is gone needs none"


def test_a_graph_without_spare_flags_clears_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(monkeypatch)

    class Graph: ...

    graph = Graph()
    with shared_tiles.flags_of(graph):
        place.launch(1, captured=True)
        place.launch(1, captured=True)
    del graph
    assert place.flags.spare == []
    place.launch(1)
    assert len(place.flags.spare) == 511


@pytest.mark.parametrize(("kind", "tile"), CASES, ids=str)
def test_they_compile_without_spills(kind: str, tile: PrefillTile, tmp_path: Path) -> None:
    source = SOURCES[kind][1]
    assert source.fits(tile, H200)
    said = nvcc("90a", source.file, dict(source.all_macros(tile, BF16)), tmp_path)
    spills = re.search(r"(\d+) bytes spill stores", said)
    assert spills is not None
    assert int(spills[1]) == 0
    assert "serialized" not in said


class Product:
    """A kernel's product by one configuration, and what it should be."""

    def __init__(self, kind: str, tile: PrefillTile, shape: tuple[int, int]) -> None:
        self.kind = kind
        if kind in NAMES:
            self.packed: PackedWeight = make_packed("0.5" if kind == "unstructured" else kind, shape, BF16, "cuda")
            self.kernel: Any = registry.get("cuda_unstructured" if kind == "unstructured" else "cuda_nm")
            self.config = (NAMES[kind], *astuple(tile))
        else:
            pattern = SparsityPattern.parse("2:4")
            keep = random_keep(shape, pattern, torch.Generator().manual_seed(0))
            self.packed = formats.for_pattern(pattern).pack(torch.randn(shape).bfloat16(), Mask(pattern, keep), value_type=kind).to("cuda")
            self.kernel = registry.get("cuda_nm_8bit")
            self.config = ("wgmma-8bit", *astuple(tile))
        self.layout = self.kernel.prepare(self.packed)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        found: Tensor = self.kernel.run_config(x, self.layout, bias, self.packed.pattern, self.config)
        return found

    def expected(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kind not in NAMES:
            tokens = quantise_rows(x, self.packed.tensors["values"].dtype)
            x = tokens.values.float() * tokens.scales[: len(x), None]
        return expected_product(x, self.packed, bias)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns", "m"), [(72, 520, 3), (5128, 1288, 300), (20552, 520, 700)])
@pytest.mark.parametrize(("kind", "tile"), CASES, ids=str)
def test_products_match_fp64(kind: str, tile: PrefillTile, rows: int, columns: int, m: int) -> None:
    """Fewer tiles than clusters, with units for some of them or for all, and more."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are of Hopper")
    product = Product(kind, tile, (rows, columns))
    x, bias = torch.randn(m, columns, device="cuda", dtype=BF16), torch.randn(rows, device="cuda", dtype=BF16)
    expected = product.expected(x, bias)
    first = None
    for _ in range(3):
        torch.full((m, rows), float("nan"), device="cuda", dtype=BF16)
        y = product(x, bias)
        assert relative_error(y, expected) < 1e-2
        first = y if first is None else first
        assert torch.equal(y, first), "sums are added in one order"
    torch.cuda.synchronize()
    of_stream = shared_tiles._of_device(torch.cuda.current_device()).of_stream
    assert of_stream
    assert not any(flags.any() for flags in of_stream.values()), "whoever reads sums clears their flag"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(SOURCES))
def test_graphs_and_streams_do_not_meet(kind: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are of Hopper")
    tile = next(tile for tile in SOURCES[kind][0] if tile.splits == 0)
    product = Product(kind, tile, (1024, 1024))
    inputs = [torch.randn(600, 1024, device="cuda", dtype=BF16) for _ in range(3)]
    expected = [product(x) for x in inputs]
    for x, y in zip(inputs, expected, strict=True):
        assert relative_error(y, product.expected(x)) < 1e-2
    torch.cuda.synchronize()
    graphs, captured = [], []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Twice: a launch finds flags as the one before it has left them.
            product(x)
            captured.append(product(x))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(20):
        eager = []
        for stream, graph, x in zip(streams, graphs, inputs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                eager.append(product(x))
        torch.cuda.synchronize()
        for found, other, y in zip(captured, eager, expected, strict=True):
            assert torch.equal(found, y)
            assert torch.equal(other, y)
