"""The products of linear_decode.py under pytest-benchmark, for a quick look at one kernel or one shape.

pytest bench/test_linear_decode.py --benchmark-only --benchmark-group-by=param:shape,param:rows -k "bf16"
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import linear_decode
import pytest
import torch

from sparse_engine import native

MISSING = native.available()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"the native library cannot be used: it {MISSING}")

SHAPES = [(768, 768), (768, 3072), (2048, 8192), (4096, 16384)]


@cache
def dense(shape: tuple[int, int], values: str) -> linear_decode.Dense:
    return linear_decode.Dense.random(shape, linear_decode.DTYPES[values])


@cache
def sparse(shape: tuple[int, int], pattern: str, values: str) -> linear_decode.Sparse:
    return linear_decode.Sparse.random(shape, pattern, linear_decode.DTYPES[values])


@pytest.mark.parametrize("kernel", [*linear_decode.PATTERNS, "dense_torch", "dense_own", "dense_onednn"])
@pytest.mark.parametrize("dtype", linear_decode.DTYPES)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_linear_decode(benchmark: Any, shape: tuple[int, int], rows: int, dtype: str, kernel: str) -> None:
    x = torch.randn(rows, shape[1]).to(linear_decode.DTYPES[dtype])
    if kernel in linear_decode.PATTERNS:
        weight = sparse(shape, kernel, dtype)
        product, nbytes = weight.product(x), weight.packed.nbytes
        assert weight.relative_error(x) < {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}[dtype]
    else:
        ways = dense(shape, dtype).products(x)
        if (name := kernel.removeprefix("dense_")) not in ways:
            pytest.skip(f"{name} has no {dtype} product on this processor")
        product, nbytes = ways[name], x.element_size() * shape[0] * shape[1]
    benchmark.extra_info.update(isa=native.isa(), threads=torch.get_num_threads(), nbytes=nbytes)
    rounds = itertools.count()
    benchmark.pedantic(lambda: product(next(rounds)), rounds=30, warmup_rounds=2)
