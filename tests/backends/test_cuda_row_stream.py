"""A single row by unstructured weights: which form of the kernel runs, that they compile and fit, and their products against float64."""

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
from sparse_engine.backends import cuda_decode, cuda_row_stream, cuda_tiles, cuda_unstructured
from sparse_engine.tuning import Measured

ROW_SHAPES = [(768, 768), (2304, 768), (768, 3072), (1024, 1024), (4096, 1024), (2048, 2048), (16384, 4096), (5120, 20480), (9216, 36864)]
ROW_CONFIGS = [
    (shape, config)
    for shape in [(768, 768), (2304, 768), (4096, 1024), (768, 3072), (5120, 20480)]
    for config in cuda_row_stream.configs(problem_of("unstructured", shape, 1), H200)
]


@pytest.mark.parametrize(("shape", "config"), ROW_CONFIGS, ids=str)
def test_forms_of_a_single_row_compile_within_their_registers(shape: tuple[int, int], config: registry.Config, tmp_path: Path) -> None:
    (source, _, macros), *others = cuda_row_stream.compilations(problem_of("unstructured", shape, 1), config, H200)
    assert not others
    said = nvcc("90a", source, dict(macros), tmp_path)
    assert max(int(count) for count in re.findall(r"(\d+) bytes spill stores", said)) == 0


@pytest.mark.parametrize("shape", ROW_SHAPES, ids=str)
def test_forms_of_a_single_row_fit_the_gpu(shape: tuple[int, int]) -> None:
    problem = problem_of("unstructured", shape, 1)
    configs = cuda_row_stream.configs(problem, H200)
    assert 3 <= len(configs) <= 6
    for config in configs:
        row = cuda_row_stream.parse_row(config, shape[1], H200) or pytest.fail(f"{config} is not understood")
        assert row.config == config
        assert row.shared_bytes(cuda_tiles.TYPICAL_DEPTH // row.tile.parts) <= H200.shared_limit
        assert row.threads <= 1024
        # The other kernel's tables are told apart.
        assert cuda_tiles.parse("unstructured", config) is None
    assert not cuda_row_stream.configs(problem, A100)
    for m in (2, 3, 4):
        assert not cuda_row_stream.configs(replace(problem, rows=m), H200)
    assert not cuda_row_stream.configs(replace(problem, in_features=shape[1] + 128), H200)


def test_a_single_row_runs_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Measured] = {}
    monkeypatch.setattr(cuda_row_stream.tuning, "lookup", lambda *_: held)

    def chosen(rows: int, columns: int, depth: int = 42, here: cuda_decode.Gpu = H200) -> cuda_row_stream.StreamRow | None:
        return cuda_row_stream.choose.__wrapped__("cuda_unstructured", torch.bfloat16, rows, columns, depth, here)

    rule = chosen(5120, 5120)
    assert rule is not None
    assert chosen(6144, 2048) is None
    assert chosen(5120, 5120 + 128) is None
    assert chosen(5120, 5120, here=A100) is None
    # Units so deep leave room for fewer warps than what was measured, or for none.
    assert chosen(5120, 5120, depth=128) is None
    assert chosen(5120, 5120, depth=1000) is None
    own = ("decode_row_unstructured.cu", 12, 2, 8, 1, 4, 2)
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
    for stale in (own[:-1], (*own, 1), (*own[:-1], 4), (*own[:-1], "2"), (*own[:-1], 0), ("decode_gone.cu", 1)):
        assert cuda_row_stream.parse_row(stale, 5120, H200) is None
        held["cuda_unstructured"] = Measured(1.0, stale)
        assert chosen(5120, 5120) == rule


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the kernel for a single row needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(3, 256), (1001, 256), (1001, 768), (83, 1024), (2120, 1280), (210, 5120)], ids=str)
@pytest.mark.parametrize("pattern", ["0.5", "0.7"])
@pytest.mark.parametrize("most", [3, 1 << 20], ids=["few blocks", "all blocks"])
def test_a_single_row_matches_fp64(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every configuration, with bias, ReLU and residual in any combination, aligned or not; few blocks have many row tiles each."""
    needs_hopper()
    resident = cuda_row_stream.resident_clusters
    monkeypatch.setattr(cuda_row_stream, "resident_clusters", lambda *given: min(most, resident(*given)))
    # The grids of both are kept under one key.
    monkeypatch.setattr(cuda_row_stream, "_prepared", cuda_row_stream._prepared.__wrapped__)
    packed = make_packed(pattern, shape, dtype, "cuda")
    kernel = registry.get("cuda_unstructured")
    layout = kernel.prepare(packed)
    rows, columns = shape
    wide = torch.randn(1, 2 * columns + 1, device="cuda", dtype=dtype)
    bias, long = torch.randn(rows, device="cuda", dtype=dtype), torch.randn(1, rows + 1, device="cuda", dtype=dtype)
    offered = cuda_row_stream.configs(registry.Problem.of(packed, 1), cuda_tiles.current_gpu())
    assert offered
    # Few warps of one slot, and of three in pairs of blocks.
    odd: list[registry.Config] = [(cuda_row_stream.SOURCE, 2, 1, 4, 2, 1, 1), (cuda_row_stream.SOURCE, 3, 3, 4, 1, 2, 2)]
    for config in [*offered, *odd] if dtype is torch.bfloat16 else [offered[0], *odd]:
        for x in (wide[:, :columns], wide[:, 1 : columns + 1], wide[:, : 2 * columns : 2]):
            torch.full((1, rows), float("nan"), device="cuda", dtype=dtype)
            y = kernel.run_config(x, layout, bias, packed.pattern, config)
            assert y.shape == (1, rows)
            assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[dtype], config
        row = cuda_row_stream.parse_row(config, columns, cuda_tiles.current_gpu()) or pytest.fail(f"{config} is not understood")
        x = wide[:, :columns].view(1, 1, columns)
        for added, onto, relu in itertools.product((None, bias), (None, long[:, :rows], long[:, 1:]), (False, True)):
            residual = None if onto is None else onto.view(1, 1, rows)
            torch.full((1, rows), float("nan"), device="cuda", dtype=dtype)
            y = cuda_row_stream.run_row(row, x, layout["weight"], added, residual, rows, relu, cuda_unstructured.streams_of(layout))
            expected = expected_product(x, packed, added)
            expected = expected.clamp_min(0) if relu else expected
            assert relative_error(y, expected if residual is None else expected + residual.double()) < TOLERANCE[dtype], config


@pytest.mark.gpu
@pytest.mark.parametrize("config", [(8, 2, 8, 1, 4, 1), (3, 1, 4, 3, 2, 1), (6, 2, 4, 1, 4, 2)], ids=str)
def test_single_rows_in_a_graph_without_anything_between(config: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator, with what a table might say; each product reads what the one before it wrote."""
    needs_hopper()
    size = 2304
    # bf16, which has the range for so many products.
    packed = make_packed("0.5", (size, size), torch.bfloat16, "cuda")
    kernel = registry.get("cuda_unstructured")
    layout = kernel.prepare(packed)
    row = cuda_row_stream.parse_row((cuda_row_stream.SOURCE, *config), size, cuda_tiles.current_gpu())
    asked: list[object] = []
    monkeypatch.setattr(cuda_row_stream, "choose", lambda *given: asked.append(given) or row)
    x = torch.empty(1, size, device="cuda", dtype=torch.bfloat16)

    def chain() -> list[Tensor]:
        steps = [x]
        for _ in range(5):
            steps.append(kernel.run_fused(steps[-1], layout, None, packed.pattern, relu=len(steps) % 2 == 0))
        return steps

    x.normal_()
    chain()
    # What a pair of rows needs is not what this kernel has.
    kernel.run(x.expand(2, size), layout, None, packed.pattern)
    assert len(asked) == 5
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
