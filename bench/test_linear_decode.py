"""The products of `sparse-engine bench` under pytest-benchmark: OPT's layers, activation rows, types and patterns; `-k` chooses.

pytest bench/test_linear_decode.py --benchmark-only --benchmark-group-by=param:shape,param:rows -k "768x3072 and bf16"

On a GPU each round is a replay of a CUDA graph of many products; `extra_info` holds their number.
"""

from __future__ import annotations

import itertools
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from sparse_engine import formats, native, registry
from sparse_engine.bench import linear_cpu, linear_gpu
from sparse_engine.bench.shapes import HIDDEN, LAYERS, PATTERNS, random_packed, shape_of
from sparse_engine.bench.suite import DTYPES, REGIMES
from sparse_engine.bench.timing import Replay, copies_of
from sparse_engine.bench.tune import TOLERANCE
from sparse_engine.pattern import SparsityPattern
from sparse_engine.policy import Policy

SHAPES = [shape_of(model, layer) for model in HIDDEN for layer in LAYERS]
NO_NATIVE, NO_GPU = native.available(), linear_gpu.why_unavailable()
# The shape varies slowest, so that no weight of another is held.
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


@lru_cache(len(DTYPES))
def dense(shape: tuple[int, int], values: str) -> linear_cpu.Dense:
    return linear_cpu.Dense.random(shape, DTYPES[values])


@lru_cache(len(DTYPES) * len(PATTERNS))
def sparse(shape: tuple[int, int], pattern: str, values: str) -> linear_cpu.Sparse:
    return linear_cpu.Sparse.random(shape, pattern, values)


@pytest.mark.skipif(NO_NATIVE is not None, reason=f"the native library cannot be used: it {NO_NATIVE}")
@pytest.mark.parametrize("kernel", [*PATTERNS, "dense_torch", "dense_own", "dense_onednn"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", REGIMES["decode"])
@over_shapes
def test_linear_decode(benchmark: Any, shape: tuple[int, int], rows: int, dtype: str, kernel: str) -> None:
    x = torch.randn(rows, shape[1]).to(DTYPES[dtype])
    if kernel in PATTERNS:
        weight = sparse(shape, kernel, dtype)
        product, nbytes = weight.product(x), weight.packed.nbytes
        assert weight.relative_error(x) < TOLERANCE[DTYPES[dtype]]
    else:
        ways = dense(shape, dtype).products(x)
        if (name := kernel.removeprefix("dense_")) not in ways:
            pytest.skip(f"{name} has no {dtype} product on this processor")
        product, nbytes = ways[name], x.element_size() * shape[0] * shape[1]
    benchmark.extra_info.update(isa=native.isa(), threads=torch.get_num_threads(), nbytes=nbytes)
    rounds = itertools.count()
    benchmark.pedantic(lambda: product(next(rounds)), rounds=30, warmup_rounds=2)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=f"a GPU cannot be used: the bench {NO_GPU}")
@pytest.mark.parametrize("kernel", [*PATTERNS, "dense"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rows", REGIMES["decode"])
@over_shapes
def test_linear_decode_gpu(benchmark: Any, shape: tuple[int, int], rows: int, dtype: str, kernel: str) -> None:
    device, values = torch.device("cuda"), DTYPES[dtype]
    x = torch.randn(rows, shape[1], device=device, dtype=values)
    bias = torch.randn(shape[0], device=device, dtype=values)
    packed = random_packed(shape, SparsityPattern.parse(PATTERNS.get(kernel, "2:4")), values, "cuda")
    problem = registry.Problem.of(packed, rows)
    chosen = registry.get("dense") if kernel == "dense" else linear_gpu.chosen(problem, None, Policy.here(device))
    copies = copies_of(chosen.prepare(packed), device)
    expected = x.double() @ formats.get(packed.format).unpack(packed).double().T + bias.double()
    error = (chosen.run(x, copies[0], bias, packed.pattern).double() - expected).norm() / expected.norm()
    assert float(error) < TOLERANCE[values]
    replay = Replay([partial(chosen.run, x, held, bias, packed.pattern) for held in copies])
    benchmark.extra_info.update(kernel=chosen.name, products=replay.count, us=replay.median_us(11))
    benchmark.pedantic(replay.us, rounds=30, warmup_rounds=5)
