"""Times the CPU kernel that dispatch chooses against every dense product at hand.

Every product reads its weights from memory: they rotate over copies larger than the last-level cache, and no product finds in cache
what another one has just read. Sparse and dense products take turns within a round, so that a busy moment of the machine meets all
of them. The limit is the time that only reading the packed bytes would take at the bandwidth measured in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import formats, native, registry
from sparse_engine.bench.shapes import PATTERNS, random_packed
from sparse_engine.bench.suite import VALUES, Suite, key_of
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

__all__ = ["Dense", "Sparse", "last_level_cache_bytes", "measure", "take_turns", "why_unavailable"]

_MOST_COPIES = 1024
"""Weights of some kilobytes stay in a cache in any model."""

_MOST_OWN_ROWS = 32
"""The library's own dense loop expands nothing and is meant for few rows: above, oneDNN is faster by far."""

_MOST_DRAWN_ROWS = 512
"""Rows of a weight that are drawn at random; a larger one repeats them, which no kernel can profit from."""

Product = Callable[[int], object]
"""Runs one product with the copy of the weight that the round's number picks."""


def last_level_cache_bytes() -> int:
    """Of one processor, from sysfs; 64 MiB where that says nothing."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=64 << 20)


def copies_of(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    count = min(2 * last_level_cache_bytes() // max(nbytes, 1) + 2, _MOST_COPIES)
    return [tensors, *({name: t.clone() for name, t in tensors.items()} for _ in range(count - 1))]


def on_huge_pages(copies: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same tensors, with the advice that the CPU kernel gives for packed weights when a layer is loaded."""
    for held in copies:
        for tensor in held.values():
            native.advise_huge_pages(tensor)
    return copies


def prepacked(weight: Tensor, bias: Tensor, rows: int) -> Callable[[Tensor], Tensor] | None:
    """oneDNN's product with a weight in its own layout, or None where this processor or build of torch has none for the type."""
    x = torch.zeros(rows, weight.shape[1], dtype=weight.dtype)
    for reorder in (lambda: torch.ops.mkldnn._reorder_linear_weight(weight, rows), weight.to_mkldnn):
        try:
            packed = reorder()
            torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        except (AttributeError, NotImplementedError, RuntimeError):
            continue
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return None


def repeated(packed: PackedWeight, times: int) -> PackedWeight:
    """A weight of ``times`` as many rows, which are those of ``packed`` over and over."""
    tensors = {name: tensor.repeat(times, *[1] * (tensor.dim() - 1)) for name, tensor in packed.tensors.items()}
    if (offsets := packed.tensors.get("row_offsets")) is not None:
        starts = torch.arange(times)[:, None] * offsets[-1] + offsets[:-1]
        tensors["row_offsets"] = torch.cat((starts.flatten(), times * offsets[-1:]))
    return replace(packed, shape=(times * packed.shape[0], packed.shape[1]), tensors=tensors)


def own_dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    native.dense_linear(x, weight, bias, out, torch.get_num_threads())
    return out


@dataclass
class Dense:
    """Dense weights of one shape and type, with every way at hand to multiply by them.

    ``plain`` lie as torch allocates them; ``weights`` on huge pages, as packed ones do, or pages would pass for sparsity.
    """

    plain: list[dict[str, Tensor]]
    weights: list[dict[str, Tensor]]
    bias: Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], dtype: torch.dtype) -> Dense:
        plain = copies_of({"w": (torch.randn(shape) * 0.02).to(dtype)})
        weights = on_huge_pages(copies_of({"w": plain[0]["w"].clone()}))
        return cls(plain, weights, torch.randn(shape[0]).to(dtype))

    def products(self, x: Tensor) -> dict[str, Product]:
        """The dense products by name; "torch" is the one that a dense model runs."""
        count = len(self.weights)
        ways: dict[str, Product] = {
            "torch": lambda i: F.linear(x, self.plain[i % len(self.plain)]["w"], self.bias),
            "torch_huge_pages": lambda i: F.linear(x, self.weights[i % count]["w"], self.bias),
        }
        if x.shape[0] <= _MOST_OWN_ROWS:
            # Half a round trip away from the copy that torch has just read.
            ways["own"] = lambda i: own_dense(x, self.weights[(i + count // 2) % count]["w"], self.bias)
        packed = [prepacked(held["w"], self.bias, x.shape[0]) for held in self.weights]
        if (usable := [product for product in packed if product is not None]) and len(usable) == len(packed):
            ways["onednn"] = lambda i: usable[i % len(usable)](x)
        return ways


@dataclass
class Sparse:
    """A packed weight of one shape, pattern and type, on the kernel that the registry chooses for it."""

    packed: PackedWeight
    bias: Tensor
    copies: list[dict[str, Tensor]]
    backend: str | None = None

    @classmethod
    def random(cls, shape: tuple[int, int], pattern: str, values: str, backend: str | None = None) -> Sparse:
        dtype, value_type = VALUES[values]
        times = next(t for t in range(1, shape[0] + 1) if shape[0] % t == 0 and shape[0] // t <= _MOST_DRAWN_ROWS)
        drawn = (shape[0] // times, shape[1])
        packed = repeated(random_packed(drawn, SparsityPattern.parse(PATTERNS[pattern]), dtype, value_type=value_type), times)
        return cls(packed, torch.randn(shape[0]).to(dtype), on_huge_pages(copies_of(dict(packed.tensors))), backend)

    def kernel(self, rows: int) -> registry.Kernel:
        kernel = registry.select(registry.Problem.of(self.packed, rows), self.backend)
        if kernel.name == "reference" and self.backend is None:
            raise KernelUnavailableError(f"no kernel but the reference runs {self.packed.pattern} at M = {rows} here")
        return kernel

    def layouts(self, kernel: registry.Kernel) -> list[registry.Layout]:
        if kernel.in_place:
            return list(self.copies)
        return [kernel.prepare(replace(self.packed, tensors=held)) for held in self.copies]

    def product(self, x: Tensor) -> Product:
        kernel = self.kernel(x.shape[0])
        layouts = self.layouts(kernel)
        return lambda i: kernel.run(x, layouts[i % len(layouts)], self.bias, self.packed.pattern)

    def relative_error(self, x: Tensor) -> float:
        """Frobenius, against fp64 of the unpacked weight; of quantised values what they stand for, and so the loss of x's rounding."""
        exact = self.packed if self.packed.value_type == PLAIN else replace(self.packed, dtype=torch.float32)
        expected = x.double() @ formats.get(self.packed.format).unpack(exact).double().T + self.bias.double()
        kernel = self.kernel(x.shape[0])
        got = kernel.run(x, kernel.prepare(self.packed), self.bias, self.packed.pattern)
        return float((got - expected).norm() / expected.norm())


def take_turns(products: dict[str, Product], seconds: float, least: int = 15, warm: bool = True) -> dict[str, list[float]]:
    """Microseconds of every product in every round, for as many rounds as fit ``seconds`` but at least ``least``.

    Args:
        warm: run each product twice in its turn, on one copy of the weight and then on the next, and count the second: as in a model,
            where layer follows layer, its code is then in cache and its threads are awake, while the weight still is not in cache.
    """
    times: dict[str, list[float]] = {name: [] for name in products}
    begun, turn = time.perf_counter(), 0
    while turn < least + 2 or time.perf_counter() - begun < seconds:
        for name, product in products.items():
            if warm:
                product(2 * turn)
            start = time.perf_counter_ns()
            product(2 * turn + 1 if warm else turn)
            times[name].append((time.perf_counter_ns() - start) / 1e3)
        turn += 1
    return {name: spent[2:] for name, spent in times.items()}  # the first rounds start threads and touch new memory


def reading(nbytes: int) -> tuple[Product, int]:
    """A product that only reads about as many bytes as the packed weight has (at least 16 MiB), and their number."""
    size = max(nbytes, 16 << 20)
    data = [held["d"] for held in on_huge_pages(copies_of({"d": torch.ones(size, dtype=torch.uint8)}))]
    threads = torch.get_num_threads()
    return (lambda i: native.read(data[i % len(data)], threads)), size


def summary(times: list[float], name: str) -> dict[str, float]:
    return {name: round(statistics.median(times), 2), f"{name}_min": round(min(times), 2)}


def why_unavailable() -> str | None:
    """Why this bench cannot run here (a phrase that can follow its name), or None when it can."""
    return native.available()


def measure(
    suite: Suite, skip: Set[tuple[Any, ...]] = frozenset(), note: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Any]]:
    """The rows of ``suite`` one by one, but for those whose key is in ``skip``.

    Args:
        note: called with a sentence for rows that are left out because the forced backend cannot run them.

    Raises:
        KernelUnavailableError: no kernel but the reference runs a product.
    """
    for model, layer, shape in suite.linears():
        weights: dict[torch.dtype, Dense] = {}
        for values in suite.dtypes:
            wanted: list[dict[str, Any]] = [
                {"model": model, "layer": layer, "n": shape[0], "k": shape[1], "m": m, "pattern": pattern, "values": values}
                for pattern in suite.patterns
                for m in suite.rows
            ]
            wanted = [head for head in wanted if key_of(head) not in skip]
            if not wanted:
                continue
            for dtype in (VALUES[values][0], torch.float32):
                if dtype not in weights:
                    weights[dtype] = Dense.random(shape, dtype)
            dense, dense_fp32 = weights[VALUES[values][0]], weights[torch.float32]
            for pattern in dict.fromkeys(head["pattern"] for head in wanted):
                sparse = Sparse.random(shape, pattern, values, suite.backend)
                read, read_bytes = reading(sparse.packed.nbytes)
                for head in (head for head in wanted if head["pattern"] == pattern):
                    try:
                        sparse.kernel(head["m"])
                    except KernelUnavailableError as error:
                        if suite.backend is None:
                            raise
                        note(f"{model} {layer} {pattern} M = {head['m']} left out: {error}")
                        continue
                    yield head | _row(sparse, dense, dense_fp32, (read, read_bytes), head["m"], suite.seconds)


def _row(sparse: Sparse, dense: Dense, dense_fp32: Dense, read: tuple[Product, int], m: int, seconds: float) -> dict[str, Any]:
    n, k = sparse.packed.shape
    x = torch.randn(m, k).to(sparse.packed.dtype)
    ways = {f"dense_{name}": product for name, product in dense.products(x).items()}
    fp32 = dense_fp32.products(x.float())["torch"]
    products = {"sparse": sparse.product(x), **ways, "dense_fp32": fp32, "read": read[0]}
    few = m <= _MOST_OWN_ROWS
    times = take_turns(products, seconds, least=15 if few else 5)
    us = statistics.median(times["sparse"])
    bandwidth = read[1] / statistics.median(times["read"]) / 1e3
    best = min(ways, key=lambda name: statistics.median(times[name]))
    return {
        "kernel": sparse.kernel(m).name,
        **summary(times["sparse"], "us"),
        **summary(times["dense_torch"], "dense_us"),
        **summary(times[best], "best_dense_us"),
        "best_dense": best.removeprefix("dense_"),
        "dense_own_us": round(statistics.median(times["dense_own"]), 2) if "dense_own" in times else None,
        "dense_onednn_us": round(statistics.median(times["dense_onednn"]), 2) if "dense_onednn" in times else None,
        "dense_fp32_us": round(statistics.median(times["dense_fp32"]), 2),
        "cusparselt_us": None,
        "gb_per_s": round(sparse.packed.nbytes / us / 1e3, 2),
        "read_gb_per_s": round(bandwidth, 2),
        "tflops": round(2e-6 * m * n * k / us, 4),
        "limit_share": round(sparse.packed.nbytes / bandwidth / 1e3 / us, 3),
        "rel_error": sparse.relative_error(x),
        "rounds": len(times["sparse"]),
    }
