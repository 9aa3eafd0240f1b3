"""What the latency benches measure: the linear layers of the OPT models, and random packed weights of their shapes."""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch

from sparse_engine import formats
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

HIDDEN = {
    "opt-125m": 768,
    "opt-350m": 1024,
    "opt-1.3b": 2048,
    "opt-2.7b": 2560,
    "opt-6.7b": 4096,
    "opt-13b": 5120,
    "opt-30b": 7168,
    "opt-66b": 9216,
}
"""Width of the hidden state."""
LAYERS = {"out": (1, 1), "qkv": (3, 1), "fc1": (4, 1), "fc2": (1, 4)}
"""Multiples of that width in (out_features, in_features)."""
PATTERNS = {"2:4": "2:4", "4:8": "4:8", "unstructured": "0.5"}
"""What the results call a pattern, and how it is parsed."""
_MOST_WAYS = 1 << 12
"""To keep N of M that are drawn from a table; it is faster by far than to sort."""


def shape_of(model: str, layer: str) -> tuple[int, int]:
    out, inner = LAYERS[layer]
    return HIDDEN[model] * out, HIDDEN[model] * inner


@cache
def _ways(n: int, m: int) -> torch.Tensor:
    """Every way to keep n of m, bool (ways, m)."""
    kept = torch.tensor(list(itertools.combinations(range(m), n)))
    return torch.zeros(len(kept), m, dtype=torch.bool).scatter_(1, kept, True)


def _random_groups(count: int, n: int, m: int, device: str) -> torch.Tensor:
    """``count`` groups that keep n of m, bool (count, m)."""
    if math.comb(m, n) <= _MOST_WAYS:
        ways = _ways(n, m).to(device)
        return ways[torch.randint(len(ways), (count,), device=device)]
    order = torch.rand(count, m, device=device).argsort(-1)
    return torch.zeros(order.shape, dtype=torch.bool, device=device).scatter_(1, order[:, :n], True)


def random_packed(
    shape: tuple[int, int], pattern: SparsityPattern, dtype: torch.dtype, device: str = "cpu", *, value_type: str = PLAIN
) -> PackedWeight:
    """A packed (out_features, in_features) weight of normal values, its kept places drawn at random."""
    weight = torch.randn(shape, device=device) * 0.02
    if pattern.is_nm:
        keep = _random_groups(shape[0] * shape[1] // pattern.group[1], *pattern.group, device).view(shape)
    else:
        keep = torch.rand(shape, device=device) < pattern.density
    return formats.for_pattern(pattern).pack(weight.to(dtype), Mask(pattern, keep), value_type=value_type)
