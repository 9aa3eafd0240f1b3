"""Times the kernel that dispatch chooses on a GPU against every dense product at hand, cuSPARSELt, and only reading the packed bytes.

All of them take turns in one run; :mod:`sparse_engine.bench.timing` says how they are timed. Errors are against float64 of the unpacked
weight, all elements of the product.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda, formats, plan, registry
from sparse_engine.bench import conditions
from sparse_engine.bench.read_floor import BLOCKS_PER_PROCESSOR, read_products
from sparse_engine.bench.shapes import PATTERNS, random_packed
from sparse_engine.bench.suite import VALUES, Suite, key_of
from sparse_engine.bench.timing import Product, Replay, copies_of, take_turns, warm_up
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.levels import levels_of_rows, relu_bound
from sparse_engine.pattern import SparsityPattern
from sparse_engine.policy import Policy
from sparse_engine.registry import Kernel, Problem
from sparse_engine.value_types import PLAIN

__all__ = ["TIMING", "chosen", "measure", "why_unavailable"]

TIMING = (
    "CUDA graph of back-to-back products with programmatic overlap, weights rotated over twice the L2 cache, "
    "medians of up to 11 replays in turns with the dense products"
)
_FEWEST_ROUNDS, _ROUNDS = 3, 11
_MOST_READ_ROWS = 128
"""Up to so many activation rows reading the weights is the limit; beyond, that or the tensor cores."""
_FLOOR_CACHES = 30
"""Bytes to be read are rotated over so many times the L2 cache: what is marked to leave the cache first makes room for none but its like,
so that a part of it stays, and is found there a rotation later. Over twice the cache, reading 382 MB took 52 to 78 µs on an H200, and over
thirty times 83 µs. Products, of weights or dense, took equally long over any."""
_CUSPARSELT = "torch_semi_structured"
_OF_LEVELS, _TO_LEVELS = "of levels", "levels to levels"
"""The kernel on activations that are quantised already, as what comes before the product leaves them."""


def why_unavailable() -> str | None:
    """Why this bench cannot run here (a phrase that can follow its name), or None when it can."""
    return cuda.why_unavailable()


def chosen(problem: Problem, backend: str | None, policy: Policy) -> Kernel:
    """The kernel that a layer would run ``problem`` with, or ``backend``.

    Raises:
        KernelUnavailableError: ``backend`` cannot run it, or nothing but the reference can.
    """
    if backend is not None:
        return registry.select(problem, backend)
    steps = plan.kernels_for(problem, None, policy)
    kernel = next((step.kernel for step in steps if problem.rows <= step.rows), steps[-1].kernel)
    if kernel.name == "reference":
        raise KernelUnavailableError(f"no kernel but the reference runs {problem.pattern} {problem.dtype} at M = {problem.rows} here")
    return kernel


def dense_products(x: Tensor, bias: Tensor, copies: list[dict[str, Tensor]]) -> dict[str, list[Product]]:
    """Every way at hand to multiply by dense weights, a call per copy; "linear" is the one that a dense model runs."""
    ways: dict[str, list[Product]] = {
        "linear": [partial(F.linear, x, held["w"], bias) for held in copies],
        "addmm": [partial(torch.addmm, bias[:, None], held["w"], x.T) for held in copies],
    }
    if x.shape[0] == 1:
        ways["addmv"] = [partial(torch.addmv, bias, held["w"], x[0]) for held in copies]
    return ways


def _floor(packed: PackedWeight, device: torch.device, pool: Any) -> float:
    """Microseconds of the fastest of the grids that only read as many bytes as ``packed`` has.

    Not in turns with the products: what reads so much memory leaves the GPU so that the next in turn takes 2 to 4 % longer.
    """
    data = torch.randint(0, 256, (packed.nbytes,), dtype=torch.uint8, device=device)
    copies = [held["d"] for held in copies_of({"d": data}, device, _FLOOR_CACHES)]
    replays = [Replay(read_products(copies, blocks), pool) for blocks in BLOCKS_PER_PROCESSOR]
    warm_up(replays[0])
    return min(replay.median_us(5) for replay in replays)


def measure(
    suite: Suite, device: torch.device, skip: Set[tuple[Any, ...]] = frozenset(), note: Callable[[str], None] = lambda text: None
) -> Iterator[dict[str, Any]]:
    """The rows of ``suite`` one by one, but for those whose key is in ``skip``; ``device`` must be the current one.

    Args:
        note: called with a sentence for rows that are left out because the forced backend cannot run them.

    Raises:
        KernelUnavailableError: no kernel but the reference runs a product.
    """
    pace = Pace(suite.budget, max(len(suite) - len(skip), 1))
    for values in suite.dtypes:
        for model, layer, shape in suite.linears():
            yield from _measure_shape(suite, device, (model, layer, shape, values), skip, note, pace)
            torch.cuda.empty_cache()


@dataclass
class Pace:
    """How many rounds each of the ``left`` rows may have so that the run ends within ``budget`` seconds, if any."""

    budget: float | None
    left: int
    _begun: float = field(default_factory=lambda: time.perf_counter())
    _done: int = 0
    _in_rounds: float = 0.0

    def rounds(self, seconds: float) -> int:
        """For a row whose rounds take ``seconds`` each; what a row takes beside its rounds is taken from the rows before it."""
        if self.budget is None:
            return _ROUNDS
        spent = time.perf_counter() - self._begun
        beside = (spent - self._in_rounds) / self._done if self._done else 0.0
        share = (self.budget - spent) / max(self.left, 1) - beside
        return max(_FEWEST_ROUNDS, min(_ROUNDS, int(share / seconds) - 1))

    def done(self, in_rounds: float) -> None:
        """A row was measured, ``in_rounds`` seconds of it in its rounds."""
        self.left -= 1
        self._done += 1
        self._in_rounds += in_rounds


def _measure_shape(
    suite: Suite,
    device: torch.device,
    what: tuple[str, str, tuple[int, int], str],
    skip: Set[tuple[Any, ...]],
    note: Callable[[str], None],
    pace: Pace,
) -> Iterator[dict[str, Any]]:
    model, layer, (n, k), values = what
    wanted = {
        (pattern, m): {"model": model, "layer": layer, "n": n, "k": k, "m": m, "pattern": pattern, "values": values}
        for pattern in suite.patterns
        for m in suite.rows
    }
    wanted = {place: head for place, head in wanted.items() if key_of(head) not in skip}
    if not wanted:
        return
    (dtype, value_type), pool = VALUES[values], torch.cuda.graph_pool_handle()
    policy = Policy.here(device)
    bias = torch.randn(n, device=device, dtype=dtype)
    all_x = torch.randn(max(m for _, m in wanted), k, device=device, dtype=dtype)
    inputs = {m: all_x[:m] for m in sorted({m for _, m in wanted})}
    copies = copies_of({"w": (torch.randn(n, k, device=device) * 0.02).to(dtype)}, device)
    dense = {m: {name: Replay(calls, pool) for name, calls in dense_products(x, bias, copies).items()} for m, x in inputs.items()}
    for pattern in dict.fromkeys(pattern for pattern, _ in wanted):
        packed = random_packed((n, k), SparsityPattern.parse(PATTERNS[pattern]), dtype, str(device), value_type=value_type)
        # Of quantised values what they stand for, and so the error is the loss of x's rounding.
        exact = packed if value_type == PLAIN else replace(packed, dtype=torch.float32)
        expected = all_x.double() @ formats.get(packed.format).unpack(exact).double().T + bias.double()
        layouts: dict[str, list[dict[str, Tensor]]] = {}
        floor = _floor(packed, device, pool)
        for m, x in inputs.items():
            if (pattern, m) not in wanted:
                continue
            problem = Problem.of(packed, m)
            try:
                kernel = chosen(problem, suite.backend, policy)
            except KernelUnavailableError as error:
                if suite.backend is None and value_type == PLAIN:
                    raise
                note(f"{model} {layer} {pattern} M = {m} left out: {error}")
                continue
            searched_for = problem.measured().get(_CUSPARSELT)
            others = [registry.get(_CUSPARSELT)] if searched_for is not None and not searched_for.stands_in else []
            replays: dict[str, Replay] = {}
            for one in dict.fromkeys((kernel, *others)):
                if one.name not in layouts:
                    layouts[one.name] = copies_of(one.prepare(packed), device)
                calls = [partial(one.run, x, held, bias, packed.pattern) for held in layouts[one.name]]
                replays[f"kernel {one.name}"] = Replay(calls, pool)
            if (element := kernel.levels_of(layouts[kernel.name][0])) is not None:
                norm = kernel.relu_norm(layouts[kernel.name][0])
                tokens = levels_of_rows(x, element, None if norm is None else relu_bound(norm, bias))
                calls = [partial(kernel.run_levels, tokens, held, bias, packed.pattern) for held in layouts[kernel.name]]
                replays[_OF_LEVELS] = Replay(calls, pool)
                # Behind fc1 is a ReLU, and fc2 multiplies what that leaves.
                if layer == "fc1" and kernel.leaves_levels(layouts[kernel.name][0], m, dtype):
                    to_levels = [partial(kernel.relu_levels, tokens, held, bias, packed.pattern) for held in layouts[kernel.name]]
                    replays[_TO_LEVELS] = Replay(to_levels, pool)
            replays |= {f"dense {name}": replay for name, replay in dense[m].items()}
            own = replays[f"kernel {kernel.name}"]
            warm_up(own, 0.01)
            begun = time.perf_counter()
            take_turns(replays, 0)
            rounds = pace.rounds(time.perf_counter() - begun)
            times = take_turns(replays, rounds)
            pace.done(time.perf_counter() - begun)
            us = times[f"kernel {kernel.name}"]
            tensor_us = conditions.tensor_limit_us(device, packed.pattern, dtype, n, k, m, value_type) if m > _MOST_READ_ROWS else None
            limit = max(floor, tensor_us or 0.0)
            best = min((name for name in times if name.startswith("dense ")), key=times.__getitem__)
            searched = times.get(f"kernel {_CUSPARSELT}") if others else None
            distance = (kernel.run(x, layouts[kernel.name][0], bias, packed.pattern) - expected[:m]).norm() / expected[:m].norm()
            yield wanted[pattern, m] | {
                "kernel": kernel.name,
                "us": round(us, 3),
                **{f"{name.replace(' ', '_')}_us": round(times[name], 3) for name in (_OF_LEVELS, _TO_LEVELS) if name in times},
                "dense_us": round(times["dense linear"], 3),
                "best_dense_us": round(times[best], 3),
                "best_dense": best.removeprefix("dense "),
                "cusparselt_us": None if searched is None else round(searched, 3),
                "gb_per_s": round((packed.dense_nbytes if kernel.keeps_dense else packed.nbytes) / us / 1e3, 1),
                "tflops": round(2e-6 * m * n * k / us, 2),
                "limit_us": round(limit, 3),
                "limit_share": round(limit / us, 3),
                "read_us": round(floor, 3),
                "tensor_us": None if tensor_us is None else round(tensor_us, 3),
                "rel_error": float(distance),
                "layout_nbytes": sum(t.numel() * t.element_size() for t in layouts[kernel.name][0].values()),
                "packed_nbytes": packed.nbytes,
                "form": _form(problem, kernel),
                "rounds": rounds,
                **conditions.sample(device, own.start, us * own.count),
            }
        del layouts, expected, floor


def _form(problem: Problem, kernel: Kernel) -> str | None:
    """Which of a kernel's forms its measured configuration names: mostly a source file."""
    found = problem.measured().get(kernel.name)
    return found.config[0] if found is not None and found.config and isinstance(found.config[0], str) else None
