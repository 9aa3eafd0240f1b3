"""Where each microsecond of a decode step goes: the time by which every kernel puts off the step's end, from a profile of real steps."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["LAST", "Span", "budget", "profiled", "roles", "split_by_clocks"]

LAST = ("greedy", "decode_model")
"""Kernels that end a greedy step of the engine."""

WHOLE = "whole step in one kernel"
PHASES = ("qkv product", "attention", "out product", "fc1 product", "fc2 product")
"""Of a layer in that kernel; each product begins with its LayerNorm or with what joins the attention's parts."""

_WHOLE_OF = {
    "decode_model": WHOLE,
    "half_attention": "LayerNorm, qkv product, attention and out product",
    "half_ffn": "LayerNorm, fc1 and fc2 products",
    "half_end": "LayerNorm",
    "attention_decode": "attention",
    "greedy": "choice of the token",
}
"""What kernels do that do the same wherever they stand."""

_FIRST = "LayerNorm and fc1 product"
_STEPS = 20


class Span(NamedTuple):
    """A kernel's run, times in µs."""

    name: str
    start: float
    end: float


_NORMS_INSIDE = "decode_row_stream"
"""The kernel that may take its row's LayerNorm."""


def roles(names: Iterable[str]) -> list[str]:
    """What each kernel of a step does, told by its place between the LayerNorms and the attention that every layer has."""
    found: list[str] = []
    role, norms, names = "embedding", 0, list(names)
    products = [i for i, name in enumerate(names) if name.startswith(_NORMS_INSIDE)]
    # A step whose products take LayerNorms themselves has one of its own behind the last layer only.
    inside = bool(products) and not any(name.startswith("layer_norm") for name in names[: products[-1]])
    for name in names:
        known = next((whole for start, whole in _WHOLE_OF.items() if name.startswith(start)), None)
        if known is not None:
            role = known
        elif inside and name.startswith(_NORMS_INSIDE):
            # With a LayerNorm behind a product onto the state, without one behind attention and behind the network's first product.
            if role not in ("attention", _FIRST):
                norms += 1
                role = "LayerNorm and qkv product" if norms % 2 else _FIRST
            else:
                role = "out product" if role == "attention" else "fc2 product"
        elif name.startswith("layer_norm"):
            role, norms = "LayerNorm", norms + 1
        elif name == "head":
            role = "head"
        elif role == "LayerNorm":
            role = "qkv product" if norms % 2 else "fc1 and fc2 products"
        elif role == "attention":
            role = "out product"
        elif role == _FIRST:
            role = "fc2 product"
        found.append(role)
    # Behind the last layer stands one LayerNorm more, and then the head.
    if norms % 2 and "choice of the token" in found and "head" not in found:
        behind = len(found) - found[::-1].index("LayerNorm")
        found[behind:] = ["head" if role == "qkv product" else role for role in found[behind:]]
    return found


def budget(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Rows ``{"part", "kernels", "us", "share"}`` of the median step in ``spans``, which holds several, each closed by one of ``LAST``.

    A kernel is charged with what lies between the end of all before it and its own, so that the parts sum to the step although kernels
    overlap; ``kernels`` counts them.

    Raises:
        ValueError: fewer than two whole steps.
    """
    # A kernel that overlaps with its predecessors may start before them, and never ends before them.
    spans = sorted(spans, key=lambda span: span.end)
    ends = [index for index, span in enumerate(spans) if span.name.startswith(LAST)]
    if len(ends) < 2:
        raise ValueError(f"{len(ends)} steps of the engine in the profile; two are needed")
    steps = []
    for before, last in itertools.pairwise(ends):
        step = spans[before + 1 : last + 1]
        charged: dict[str, float] = defaultdict(float)
        kernels: dict[str, int] = defaultdict(int)
        until = spans[before].end
        for span, role in zip(step, roles(span.name for span in step), strict=True):
            charged[role] += max(0.0, span.end - until)
            kernels[role] += 1
            until = max(until, span.end)
        steps.append((sum(charged.values()), charged, kernels))
    total = statistics.median_low([step[0] for step in steps])
    _, charged, kernels = next(step for step in steps if step[0] == total)
    return [
        {"part": role, "kernels": kernels[role], "us": round(us, 2), "share": round(us / total, 4)}
        for role, us in sorted(charged.items(), key=lambda item: -item[1])
    ]


def profiled(generate: Callable[[int], object]) -> list[Span]:
    """The kernels of ``generate(tokens)``, which must have run before, from its middle steps on."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate(2 * _STEPS)
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in kernels]
    spans.sort(key=lambda span: span.end)
    ends = [index for index, span in enumerate(spans) if span.name.startswith(LAST)]
    # The first half of the steps follows the prompt, whose traffic is still in the caches.
    return spans[ends[-_STEPS - 1] : ends[-1] + 1] if len(ends) > _STEPS else spans


def split_by_clocks(rows: Sequence[dict[str, Any]], clocks: torch.Tensor) -> list[dict[str, Any]]:
    """``rows`` of :func:`budget` with the whole step's kernel divided among its phases.

    ``clocks`` (steps, blocks, 5 * layers + 2, 2) are those of steps of the engine's ``WholeStep``. A phase
    lasts from when the median block that has a part in it has what it waits for until the same in the next phase: what it computes, its
    result's way through L2 and the wait for the slowest block.
    """
    times = clocks.double()
    times[times == 0] = torch.nan
    times = times - times[:, :, -1:, :1]
    begun = times[..., 0].nanmedian(1).values.nanmedian(0).values[:-1]
    end = times[:, 0, -1, 1].median()
    lasting = torch.cat([begun[1:], end[None]]) - begun
    layers = (len(lasting) - 1) // len(PHASES)
    parts = dict(zip(PHASES, lasting[:-1].view(layers, -1).sum(0).tolist(), strict=True))
    parts |= {"head and choice of the token": float(lasting[-1]), "embedding and first copies": float(begun[0])}
    split: list[dict[str, Any]] = []
    for row in rows:
        if row["part"] != WHOLE:
            split.append(row)
            continue
        for part, cycles in parts.items():
            share = cycles / float(end)
            split.append({"part": part, "kernels": 0, "us": round(row["us"] * share, 2), "share": round(row["share"] * share, 4)})
    return sorted(split, key=lambda row: -row["us"])
