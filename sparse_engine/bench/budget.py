"""Where each microsecond of a decode step goes: the time by which every kernel puts off the step's end, from a profile of real steps."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

__all__ = ["LAST", "Span", "budget", "profiled", "roles"]

LAST = ("greedy", "decode_model")
"""Kernels that end a greedy step of the engine."""

_STEPS = 20


class Span(NamedTuple):
    """A kernel's run, times in µs."""

    name: str
    start: float
    end: float


def roles(names: Iterable[str]) -> list[str]:
    """What each kernel of a step does, told by its place between the LayerNorms and the attention that every layer has."""
    found: list[str] = []
    role, norms = "embedding", 0
    for name in names:
        if name.startswith("decode_model"):
            role = "whole step in one kernel"
        elif name.startswith("attention_decode"):
            role = "attention"
        elif name.startswith("layer_norm"):
            role, norms = "LayerNorm", norms + 1
        elif name.startswith("greedy"):
            role = "choice of the token"
        elif role == "LayerNorm":
            role = "qkv product" if norms % 2 else "fc1 and fc2 products"
        elif role == "attention":
            role = "out product"
        found.append(role)
    # Behind the last layer stands one LayerNorm more, and then the head.
    if norms % 2 and "choice of the token" in found:
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
