"""Few rows by sparse weights, units coming to each warp: which form runs, that they compile and fit, and products against float64."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_products import A100, H200, TOLERANCE, make_packed, nvcc, problem_of
from products import expected_product, relative_error
from torch import Tensor

from sparse_engine import registry
from sparse_engine.backends import cuda_decode, cuda_prefill, cuda_row_forms, cuda_row_stream, cuda_tiles, cuda_unstructured
from sparse_engine.tuning import Measured

ROW_SHAPES = [(768, 768), (2304, 768), (768, 3072), (1024, 1024), (4096, 1024), (2048, 2048), (16384, 4096), (5120, 20480), (9216, 36864)]
PATTERNS = ("2:4", "4:8", "unstructured")
ROW_CONFIGS = [
    (pattern, shape, m, config)
    for pattern in PATTERNS
    for shape, m in [
        ((768, 768), 1),
        ((2304, 768), 2),
        ((4096, 1024), 1),
        ((768, 3072), 8),
        ((4096, 4096), 16),
        ((5120, 20480), 1),
        ((4096, 16384), 4),
    ]
    for config in cuda_row_forms.configs(problem_of(pattern, shape, m), H200)
]


@pytest.mark.parametrize(("pattern", "shape", "m", "config"), ROW_CONFIGS, ids=str)
def test_forms_of_few_rows_compile_within_their_registers(
    pattern: str, shape: tuple[int, int], m: int, config: registry.Config, tmp_path: Path
) -> None:
    (source, _, macros), *others = cuda_row_forms.compilations(problem_of(pattern, shape, m), config, H200)
    assert not others
    said = nvcc("90a", source, dict(macros), tmp_path)
    assert max(int(count) for count in re.findall(r"(\d+) bytes spill stores", said)) == 0


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_forms_of_few_rows_fit_the_gpu(shape: tuple[int, int], pattern: str) -> None:
    for m in (1, 2, 3, 8, 16):
        problem = problem_of(pattern, shape, m)
        configs = cuda_row_forms.configs(problem, H200)
        # The longest rows leave no room for eight of them beside enough warps.
        assert (3 if m == 1 else 1 if shape[1] < 16384 else 0) <= len(configs) <= 12
        for config in configs:
            row = cuda_row_stream.parse_row(pattern, config, shape[1], m, H200) or pytest.fail(f"{config} is not understood")
            assert row.config == config
            assert m <= row.x_rows < 2 * m
            assert row.equal_shares
            assert row.shared_bytes(cuda_tiles.TYPICAL_DEPTH // row.tile.parts) <= H200.shared_limit
            assert row.threads <= 1024
            # The other kernel's tables are told apart.
            assert cuda_tiles.parse(pattern, config) is None
        assert not cuda_row_forms.configs(problem, A100)
        assert not cuda_row_forms.configs(replace(problem, in_features=shape[1] + 128), H200)
    assert not cuda_row_forms.configs(problem_of(pattern, shape, 17), H200)


def test_a_single_row_runs_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Measured] = {}
    monkeypatch.setattr(cuda_row_forms.tuning, "lookup", lambda *_: held)

    def chosen(rows: int, columns: int, depth: int = 42, here: cuda_decode.Gpu = H200, m: int = 1) -> cuda_row_stream.StreamRow | None:
        return cuda_row_forms.choose.__wrapped__("cuda_unstructured", "unstructured", torch.bfloat16, rows, columns, m, depth, here)

    rule = chosen(5120, 5120)
    assert rule is not None
    assert chosen(6144, 2048) is None
    assert chosen(5120, 5120 + 128) is None
    assert chosen(5120, 5120, here=A100) is None
    # Clusters have room for rows that one block has none for, up to a length.
    assert [row.tile.cluster if row is not None else 0 for row in (chosen(5120, 5120 * k, m=4) for k in (1, 4, 8))] == [1, 2, 0]
    assert chosen(5120, 5120, m=9) is None
    # Units so deep leave room for fewer warps than what was measured, or for none.
    assert chosen(5120, 5120, depth=128) is None
    assert chosen(5120, 5120, depth=1000) is None
    own = ("decode_row_stream.cu", 12, 2, 8, 1, 4, 2)
    held["cuda_unstructured"] = Measured(1.0, own)
    for shape in ((5120, 5120), (6144, 2048)):
        found = chosen(*shape)
        assert found is not None
        assert found.config == own
    deep = chosen(5120, 5120, depth=128)
    assert deep is not None
    assert deep.tile.warps_k < 12
    assert deep.shared_bytes(128) <= H200.shared_limit
    assert chosen(5120, 5120, depth=1000) is None
    assert chosen(5120, 5120 + 128) is None
    held["cuda_unstructured"] = Measured(1.0, ("decode_unstructured.cu", 1, 1, 1, 4, 1, 1, 2, 2, 8, 1))
    assert chosen(5120, 5120) is None
    # Of other versions.
    for stale in (own[:-1], (*own, 1), (*own[:-1], 5), (*own[:-1], "2"), (*own[:-1], 0), ("decode_gone.cu", 1)):
        assert cuda_row_stream.parse_row("unstructured", stale, 5120, 1, H200) is None
        held["cuda_unstructured"] = Measured(1.0, stale)
        assert chosen(5120, 5120) == rule


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_single_row_of_groups_runs_as_the_table_says(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Measured] = {}
    monkeypatch.setattr(cuda_row_forms.tuning, "lookup", lambda *_: held)

    def chosen(columns: int, here: cuda_decode.Gpu = H200) -> cuda_row_stream.StreamRow | None:
        return cuda_row_forms.choose.__wrapped__("cuda_nm", pattern, torch.bfloat16, 5120, columns, 1, 0, here)

    rule = chosen(5120)
    assert rule is not None
    own = ("decode_row_stream.cu", 8, 3, 2, 1, 4, 1)
    held["cuda_nm"] = Measured(1.0, own)
    found = chosen(5120)
    assert found is not None
    assert found.config == own
    assert found.tile.parts == 2
    assert chosen(5120 + 128) is None
    assert chosen(5120, here=A100) is None
    held["cuda_nm"] = Measured(1.0, ("decode_nm.cu", 1, 1, 1, 8, 1, 1, 2, 2, 16, 1))
    assert chosen(5120) is None
    for stale in (own[:-1], (*own[:3], 3, *own[4:]), ("decode_gone.cu", *own[1:])):
        held["cuda_nm"] = Measured(1.0, stale)
        assert chosen(5120) == rule


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernel for a single row needs compute capability 9.0")


ODD = {
    # Few warps of one slot, three slots in pairs of blocks, and more warps than units.
    1: [(2, 1, 4, 2, 1, 1), (3, 3, 4, 1, 2, 2), (12, 2, 4, 1, 4, 2)],
    4: [(3, 1, 4, 2, 1, 1), (1, 3, 4, 1, 2, 2)],
    8: [(3, 2, 4, 2, 1, 1), (1, 2, 4, 1, 1, 4)],
    16: [(3, 2, 4, 1, 1, 1), (1, 1, 4, 1, 4, 4)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(3, 256), (1001, 256), (1001, 768), (83, 1024), (2120, 1280), (210, 5120)], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5", "0.7"])
@pytest.mark.parametrize("most", [3, 1 << 20], ids=["few blocks", "all blocks"])
def test_few_rows_match_fp64(pattern: str, shape: tuple[int, int], dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every configuration, with bias, ReLU and residual in any combination, aligned or not; few blocks have many row tiles each."""
    needs_hopper()
    resident = cuda_row_stream.resident_clusters
    monkeypatch.setattr(cuda_row_stream, "resident_clusters", lambda *given: min(most, resident(*given)))
    # The grids of both are kept under one key.
    monkeypatch.setattr(cuda_row_stream, "_prepared", cuda_row_stream._prepared.__wrapped__)
    packed = make_packed(pattern, shape, dtype, "cuda")
    kind = pattern if packed.pattern.is_nm else "unstructured"
    kernel = registry.get("cuda_nm" if packed.pattern.is_nm else "cuda_unstructured")
    layout = kernel.prepare(packed)
    streams = None if packed.pattern.is_nm else cuda_unstructured.streams_of(layout)
    rows, columns = shape
    bias = torch.randn(rows, device="cuda", dtype=dtype)
    here, ran = cuda_tiles.current_gpu(), 0
    for m, capacity in ((1, 1), (2, 2), (3, 4), (4, 4), (7, 8), (8, 8), (9, 16), (16, 16)):
        wide, long = torch.randn(m, 2 * columns + 8, device="cuda", dtype=dtype), torch.randn(m * (rows + 1), device="cuda", dtype=dtype)
        offered = cuda_row_forms.configs(registry.Problem.of(packed, m), here)
        assert offered or m > 1
        for config in [
            *(offered if dtype is torch.bfloat16 else offered[:1]),
            *((cuda_row_stream.SOURCE, *fields) for fields in ODD.get(capacity, [])),
        ]:
            row = cuda_row_stream.parse_row(kind, config, columns, m, here)
            if row is None:
                # Warps of that cluster have no equal shares of such rows.
                assert config not in offered
                continue
            ran += 1
            for x in (wide[:, :columns], wide[:, 1 : columns + 1], wide[:, : 2 * columns : 2]):
                torch.full((m, rows), float("nan"), device="cuda", dtype=dtype)
                y = kernel.run_config(x, layout, bias, packed.pattern, config)
                assert y.shape == (m, rows)
                assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[dtype], (m, config)
            x = wide[:, :columns].unsqueeze(1)
            aligned, shifted = long[: m * rows].view(m, 1, rows), long[1 : m * rows + 1].view(m, 1, rows)
            for added, onto, relu in itertools.product((None, bias), (None, aligned, shifted), (False, True)):
                torch.full((m, rows), float("nan"), device="cuda", dtype=dtype)
                call = cuda_prefill.Call(kind, x, layout["weight"], added, onto, rows, columns, relu, streams)
                y = cuda_row_stream.run_rows(row, call)
                expected = expected_product(x, packed, added)
                expected = expected.clamp_min(0) if relu else expected
                assert relative_error(y, expected if onto is None else expected + onto.double()) < TOLERANCE[dtype], (m, config)
    assert ran


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
@pytest.mark.parametrize("config", [(8, 2, 4, 1, 4, 1), (3, 1, 4, 3, 2, 1), (6, 2, 4, 1, 4, 2)], ids=str)
def test_single_rows_in_a_graph_without_anything_between(config: tuple[int, ...], pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator, with what a table might say; each product reads what the one before it wrote."""
    needs_hopper()
    size = 2304
    # bf16, which has the range for so many products.
    packed = make_packed(pattern, (size, size), torch.bfloat16, "cuda")
    kind = pattern if packed.pattern.is_nm else "unstructured"
    kernel = registry.get("cuda_nm" if packed.pattern.is_nm else "cuda_unstructured")
    layout = kernel.prepare(packed)
    row = cuda_row_stream.parse_row(kind, (cuda_row_stream.SOURCE, *config), size, 1, cuda_tiles.current_gpu())
    asked: list[object] = []
    monkeypatch.setattr(cuda_row_forms, "choose", lambda *given: asked.append(given[5]) or (row if given[5] == 1 else None))
    x = torch.empty(1, size, device="cuda", dtype=torch.bfloat16)

    def chain() -> list[Tensor]:
        steps = [x]
        for _ in range(5):
            steps.append(kernel.run_fused(steps[-1], layout, None, packed.pattern, relu=len(steps) % 2 == 0))
        return steps

    x.normal_()
    chain()
    kernel.run(x.expand(2, size), layout, None, packed.pattern)
    # What more rows need is not what this kernel has.
    kernel.run(x.expand(17, size), layout, None, packed.pattern)
    assert asked == [1, 1, 1, 1, 1, 2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps = chain()
    for trial in range(10):
        x.copy_(torch.randn(1, size, generator=torch.Generator().manual_seed(trial)))
        for step in steps[1:]:
            step.fill_(float("nan"))
        graph.replay()
        for i, (before, after) in enumerate(itertools.pairwise(steps)):
            expected = expected_product(before, packed, None)
            assert relative_error(after, expected.clamp_min(0) if i % 2 else expected) < TOLERANCE[torch.bfloat16]
