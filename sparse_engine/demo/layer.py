"""One decoder layer of OPT-1.3b's shape at M = 1: its six linears packed, by this machine's best kernel, against torch's dense linear.

The weights are random: time and bytes do not depend on their values.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import formats, pruners
from sparse_engine.linear import SparseLinear
from sparse_engine.pattern import SparsityPattern

__all__ = ["LINEARS", "LayerTimes", "measure_layer"]

LINEARS = {
    "q_proj": (2048, 2048),
    "k_proj": (2048, 2048),
    "v_proj": (2048, 2048),
    "out_proj": (2048, 2048),
    "fc1": (8192, 2048),
    "fc2": (2048, 8192),
}
"""(out_features, in_features) of each linear of an OPT-1.3b layer."""

_MOST_COPIES = 4
_UNKNOWN_CACHE = 64 << 20


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Median microseconds over all linears of a layer, one activation row, and bytes of their weights.

    ``kernels`` names the kernel of each linear; ``copies`` layers were gone through in turn, so that no weight was in cache.
    """

    kernels: dict[str, str]
    packed_us: float
    dense_bf16_us: float
    dense_fp32_us: float
    packed_nbytes: int
    dense_bf16_nbytes: int
    copies: int
    rounds: int


def _cache_nbytes() -> int:
    """Size of the last-level cache of the first core, or a guess where the system does not tell."""
    found = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        found = max(found, int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return found or _UNKNOWN_CACHE


def _microseconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    started = time.perf_counter()
    product(x)
    return (time.perf_counter() - started) * 1e6


def _linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def measure_layer(pattern: SparsityPattern, *, rounds: int = 30) -> LayerTimes:
    """Time the layer ``rounds`` times in each form, the forms in turn, after a round to warm up.

    Raises:
        KernelUnavailableError: no kernel runs the packed products.
    """
    generator = torch.Generator().manual_seed(0)
    x = {columns: torch.randn(1, columns, generator=generator).bfloat16() for _, columns in LINEARS.values()}
    x32 = {columns: row.float() for columns, row in x.items()}
    packed, dense = {}, {}
    for name, (rows, columns) in LINEARS.items():
        weight = torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()
        masked, mask = pruners.get("magnitude").prune(weight, None, pattern)
        packed[name] = formats.for_pattern(pattern).pack(masked, mask, name)
        dense[name] = weight
    packed_nbytes = sum(p.nbytes for p in packed.values())
    dense_nbytes = sum(w.nbytes for w in dense.values())
    copies = min(_MOST_COPIES, math.ceil(2 * _cache_nbytes() / packed_nbytes) + 1)
    kernels: dict[str, str] = {}
    forms: dict[str, list[tuple[Callable[[Tensor], Tensor], Tensor]]] = {"packed": [], "bf16": [], "fp32": []}
    for _ in range(copies):
        for name, (_, columns) in LINEARS.items():
            module = SparseLinear.from_packed(replace(packed[name], tensors={key: t.clone() for key, t in packed[name].tensors.items()}))
            kernels[name] = module.plan()[0][1].name
            forms["packed"].append((module, x[columns]))
            forms["bf16"].append((_linear(dense[name].clone()), x[columns]))
            forms["fp32"].append((_linear(dense[name].float()), x32[columns]))
    times: dict[str, list[list[float]]] = {form: [[] for _ in products] for form, products in forms.items()}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for form, products in forms.items():
                for samples, (product, row) in zip(times[form], products, strict=True):
                    taken = _microseconds(product, row)
                    if turn:
                        samples.append(taken)
    total = {form: sum(statistics.median(samples) for samples in each) / copies for form, each in times.items()}
    return LayerTimes(kernels, total["packed"], total["bf16"], total["fp32"], packed_nbytes, dense_nbytes, copies, rounds)
