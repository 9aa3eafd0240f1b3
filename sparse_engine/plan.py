"""Which kernel a layer uses for each bucket of activation rows: the fastest, with as few layouts of its weight as that allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from sparse_engine import registry
from sparse_engine.formats.base import PackedWeight
from sparse_engine.policy import UNLIMITED, Policy
from sparse_engine.registry import DECODE_ROWS, ESTIMATE, PROMPT_GAIN, Kernel, Problem, Verdict, dense_gain

__all__ = ["PROMPT_MOST", "SLACK", "Step", "fewest_layouts", "held_nbytes", "kernels_for"]

SLACK = 1.04
"""A kernel within this factor of the fastest is as good as the fastest: measured times scatter as much from run to run, and a layout more
is the layer's bytes once more. For more rows than a decode step has, the factor is :data:`registry.PROMPT_GAIN`."""

PROMPT_MOST = 1.2
"""No prompt's product takes longer by more than this factor than by a kernel that would need a layout of its own."""


@dataclass(frozen=True, slots=True)
class Step:
    """Up to ``rows`` activation rows are multiplied by ``kernel``; ``verdict`` has its time there and where that is from."""

    rows: int
    kernel: Kernel
    verdict: Verdict


def kernels_for(problem: Problem, backend: str | None = None, policy: Policy = UNLIMITED, *, without: Set[str] = frozenset()) -> list[Step]:
    """A step for each of :data:`registry.ROW_BUCKETS`: ``backend`` for all of them where it is given, else the registry's choice.

    Args:
        without: names of kernels that are no choice of the registry's here.

    Raises:
        InputError: no kernel is called ``backend``.
        KernelUnavailableError: ``backend``, or every kernel, rejects one of the problems.
    """
    kernels = registry.all_kernels()
    in_place = {name for name, kernel in kernels.items() if kernel.in_place}
    table: list[dict[str, Verdict]] = []
    dense: list[dict[str, Verdict]] = []
    able: list[dict[str, Verdict]] = []
    for rows in registry.ROW_BUCKETS:
        asked = problem.with_rows(rows)
        verdicts = [verdict for verdict in registry.explain(asked, policy) if backend is not None or verdict.kernel not in without]
        if backend is not None or not verdicts or verdicts[0].reason is not None:
            name = registry.select(asked, backend, policy).name
            table.append({name: next(v for v in verdicts if v.kernel == name)})
            dense.append({})
            able.append({})
        else:
            table.append(_as_good(verdicts, rows, once=policy.holds_once(asked)))
            able.append(_rivals(verdicts))
            limit = max(map(_time, table[-1].values()))
            dense.append({} if policy.forbids(asked) else {v.kernel: v for v in _measured_dense(verdicts) if _time(v) <= limit})
    table = _with_what_steps_hold(table, able, in_place)
    names = _names(table, in_place)
    if any(kernels[name].keeps_dense for name in names):
        # The copy that some numbers of rows are worth is there for the others as well.
        table = [row | also for row, also in zip(table, dense, strict=True)]
        names = _names(table, in_place)
    return [Step(rows, kernels[name], row[name]) for rows, name, row in zip(registry.ROW_BUCKETS, names, table, strict=True)]


def _names(table: Sequence[Mapping[str, Verdict]], in_place: Set[str]) -> list[str]:
    return fewest_layouts([{name: _time(v) for name, v in row.items()} for row in table], in_place)


def _time(verdict: Verdict) -> float:
    return verdict.cost if verdict.cost is not None else 0.0


def _measured_dense(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Dense products, also those that alone would not be worth a copy of the weight."""
    return [v for v in verdicts if registry.get(v.kernel).keeps_dense and v.source not in (None, ESTIMATE)]


def _as_good(verdicts: Sequence[Verdict], rows: int, *, once: bool) -> dict[str, Verdict]:
    """The able kernels that may stand in for the chosen one, which is first; an estimate is no rival for a measured time.

    None of them is slower than the dense product by more than the chosen one may be, unless the weight is to be held ``once``.
    """
    best = verdicts[0]
    limit = (SLACK if rows <= DECODE_ROWS else PROMPT_GAIN) * _time(best)
    if dense := _measured_dense(verdicts):
        limit = min(limit, max(_time(best), dense_gain(rows) * min(map(_time, dense))))
    if once:
        limit = math.inf
    return {name: v for name, v in _rivals(verdicts).items() if _time(v) <= limit}


def _rivals(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    """The able kernels whose times are of the same kind as the chosen one's, which is first."""
    estimated = verdicts[0].source == ESTIMATE
    return {v.kernel: v for v in verdicts if v.reason is None and (v.source == ESTIMATE) == estimated}


def _with_what_steps_hold(
    table: Sequence[dict[str, Verdict]], able: Sequence[Mapping[str, Verdict]], in_place: Set[str]
) -> list[dict[str, Verdict]]:
    """``table`` with prompts left to the kernels that decode steps hold a layout for, where another would gain little.

    Little is :data:`registry.PROMPT_GAIN` over prompts of all lengths, and :data:`PROMPT_MOST` of any.
    """
    few = sum(rows <= DECODE_ROWS for rows in registry.ROW_BUCKETS)
    held = set(_names(table[:few], in_place))
    kept = [{name: v for name, v in row.items() if name in held} for row in able[few:]]
    if not all(kept):
        return list(table)
    losses = [min(map(_time, own.values())) / min(map(_time, row.values())) for own, row in zip(kept, table[few:], strict=True)]
    if math.prod(losses) ** (1 / len(losses)) > PROMPT_GAIN or max(losses) > PROMPT_MOST:
        return list(table)
    return [*table[:few], *kept]


def fewest_layouts(options: Sequence[Mapping[str, float]], in_place: Set[str]) -> list[str]:
    """One name per bucket out of ``options``, its kernels by time: as few layouts as possible, then as little time as possible.

    Kernels ``in_place`` share one layout, the packed tensors.
    """
    names = sorted(set().union(*options))
    best: tuple[int, float, list[str]] | None = None
    for size in range(1, len(names) + 1):
        for allowed in itertools.combinations(names, size):
            picks = [min((n for n in row if n in allowed), key=lambda n: (row[n], n), default=None) for row in options]
            picked = [name for name in picks if name is not None]
            if len(picked) < len(options):
                continue
            layouts = len(set(picked) - in_place) + bool(in_place & set(picked))
            slowness = sum(row[name] / max(min(row.values()), 1e-9) for row, name in zip(options, picked, strict=True))
            if best is None or (layouts, slowness) < best[:2]:
                best = layouts, slowness, picked
    if best is None:
        raise ValueError("every bucket needs at least one kernel")
    return best[2]


def held_nbytes(problem: Problem, steps: Sequence[Step], packed: PackedWeight) -> int | None:
    """Bytes that a layer holds of ``packed`` for its kernels, padding and dense copies included; None where a kernel cannot tell."""
    sizes = {step.kernel.name: step.kernel.layout_nbytes(problem, packed) for step in steps if not step.kernel.in_place}
    if any(step.kernel.in_place for step in steps):
        sizes[""] = packed.nbytes
    known = [size for size in sizes.values() if size is not None]
    return sum(known) if len(known) == len(sizes) else None
