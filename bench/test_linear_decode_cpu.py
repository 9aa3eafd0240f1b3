"""Latency of the native CPU products against dense ones, at M = 1 to 8 activation rows, weights from memory.

Each round runs torch's dense linear, every other dense product at hand and the packed one after another on the same
activations, so that a change of the machine's speed meets all of them alike; medians are over the rounds. Weights rotate over
copies that together exceed the last-level cache three times over.

    pytest bench/test_linear_decode_cpu.py --benchmark-only
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opt_shapes import LAYERS, PATTERNS, shape
from torch import Tensor

from sparse_engine import SparseLinear, SparsityPattern, formats, native
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
FEWEST_ROUNDS = 15
Product = Callable[[Tensor], Tensor]


def copies_for(nbytes: int) -> int:
    """Copies of ``nbytes`` that exceed three times the last-level cache (64 MB where it is not known)."""
    match = re.fullmatch(r"(\d+)K", CACHE.read_text().strip()) if CACHE.exists() else None
    last_level = int(match[1]) * 1024 if match else 64 << 20
    return 1 + 3 * last_level // nbytes


@cache
def read_bandwidth() -> float:
    """Bytes per second at which all threads together read a gigabyte, the best of ten passes."""
    data = torch.ones(1 << 28, dtype=torch.float32)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        native.read(data, torch.get_num_threads())
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def random_packed(out_features: int, in_features: int, pattern: SparsityPattern, dtype: torch.dtype) -> PackedWeight:
    weight = (torch.randn(out_features, in_features) * 0.02).to(dtype)
    if pattern.is_nm:
        n, m = pattern.group
        order = torch.rand(out_features, in_features // m, m).argsort(-1)
        keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(2, order[..., :n], True).view(weight.shape)
    else:
        keep = torch.rand(weight.shape) >= 1 - pattern.density
    return formats.for_pattern(pattern).pack(weight, Mask(pattern, keep))


def own_dense(weight: Tensor, bias: Tensor) -> Product:
    def product(x: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        native.dense_linear(x, weight, bias, out, torch.get_num_threads())
        return out

    return product


def prepacked(weight: Tensor, bias: Tensor, m: int) -> Product | None:
    """oneDNN with its own weight layout, where this processor has the type."""
    if weight.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    try:
        layout = torch.ops.mkldnn._reorder_linear_weight(weight.to_mkldnn(), m)
    except (AttributeError, RuntimeError):
        return None
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")


def dense_products(weights: list[Tensor], bias: Tensor, m: int) -> dict[str, list[Product]]:
    """Every dense product at hand by name, each over all copies of the weight."""
    products: dict[str, list[Product]] = {
        "torch": [lambda x, w=w: F.linear(x, w, bias) for w in weights],
        "own": [own_dense(w, bias) for w in weights],
    }
    packed = [prepacked(w, bias, m) for w in weights]
    if all(product is not None for product in packed):
        products["onednn-prepacked"] = [product for product in packed if product is not None]
    return products


@pytest.fixture(scope="session", params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def dense(model: str, layer: str, values: str) -> tuple[list[Tensor], Tensor]:
    """Copies of a dense weight, and a bias."""
    out_features, in_features = shape(model, layer)
    weight = (torch.randn(out_features, in_features) * 0.02).to(DTYPES[values])
    copies = [weight, *(weight.clone() for _ in range(copies_for(weight.nbytes) - 1))]
    return copies, torch.randn(out_features).to(DTYPES[values])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_linear_decode(
    benchmark: Any,
    request: pytest.FixtureRequest,
    rows: list[dict[str, Any]],
    dense: tuple[list[Tensor], Tensor],
    model: str,
    layer: str,
    values: str,
    pattern: str,
    m: str,
) -> None:
    weights, bias = dense
    count = int(m)
    out_features, in_features = shape(model, layer)
    packed = random_packed(out_features, in_features, SparsityPattern.parse(PATTERNS[pattern]), DTYPES[values])
    layers = [SparseLinear.from_packed(packed, bias)]
    for _ in range(copies_for(packed.nbytes) - 1):
        tensors = {name: tensor.clone() for name, tensor in packed.tensors.items()}
        layers.append(SparseLinear.from_packed(PackedWeight(**{**_fields(packed), "tensors": tensors}), bias))
    for module in layers:
        module.plan()
    kernel = next(chosen for limit, chosen, _ in layers[0].plan() if count <= limit)
    assert kernel.name != "reference", "the fallback was chosen: a figure for it would say nothing of the kernels"
    x = torch.randn(count, in_features).to(DTYPES[values])

    with torch.inference_mode():
        error = relative_error(layers[0](x), x, packed, bias)
        products = dense_products(weights, bias, count)
        streams = {name: cycle(variants) for name, variants in products.items()}
        times: dict[str, list[float]] = {name: [] for name in products}
        modules = cycle(layers)

        def run_dense() -> tuple[tuple[Any, ...], dict[str, Any]]:
            for name, stream in streams.items():
                product = next(stream)
                started = time.perf_counter()
                product(x)
                times[name].append(time.perf_counter() - started)
            return (next(modules), x), {}

        started = time.perf_counter()
        for _ in range(3):
            (module, _), _ = run_dense()
            module(x)
        rounds = max(FEWEST_ROUNDS, int(request.config.getoption("--seconds") * 3 / (time.perf_counter() - started)))
        for measured in times.values():
            measured.clear()
        benchmark.pedantic(lambda module, x: module(x), setup=run_dense, rounds=rounds, warmup_rounds=0)

    seconds = benchmark.stats.stats.median
    medians = {name: statistics.median(measured) * 1e6 for name, measured in times.items()}
    floor = packed.nbytes / read_bandwidth()
    row = {
        "model": model,
        "layer": layer,
        "n": out_features,
        "k": in_features,
        "m": count,
        "pattern": pattern,
        "values": values,
        "kernel": f"{kernel.name}-{native.isa()}",
        "us": seconds * 1e6,
        "us_min": benchmark.stats.stats.min * 1e6,
        "dense_us": medians["torch"],
        "best_dense_us": min(medians.values()),
        "best_dense": min(medians, key=medians.__getitem__),
        "dense_us_by_kernel": medians,
        "dense_us_min_by_kernel": {name: min(measured) * 1e6 for name, measured in times.items()},
        "cusparselt_us": None,
        "gb_per_s": packed.nbytes / seconds / 1e9,
        "read_gb_per_s": read_bandwidth() / 1e9,
        "tflops": 2 * packed.nnz * count / seconds / 1e12,
        "limit_share": floor / seconds,
        "rel_error": error,
        "rounds": rounds,
    }
    benchmark.extra_info.update(row)
    if not rows:
        row["device"] = request.config.getoption("--device-name")
    rows.append(row)


def relative_error(y: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor) -> float:
    """Relative Frobenius error against float64 of the unpacked weight."""
    expected = F.linear(x.double(), formats.get(packed.format).unpack(packed).double(), bias.double())
    return float((y.double() - expected).norm() / expected.norm())


def _fields(packed: PackedWeight) -> dict[str, Any]:
    return {name: getattr(packed, name) for name in ("format", "version", "pattern", "shape", "dtype")}
