"""What ``sparse-engine tune`` does: measures every able kernel in every configuration, and records the fastest of each kernel.

Every configuration's product is compared with float64 before it is timed. A few replays tell which configurations are worth more of
them; those close to the fastest then take turns. The result goes into the tuning table weight by weight, also when a run is
interrupted, so that the next goes on where it stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from sparse_engine import cuda, formats, registry, tuning
from sparse_engine.bench.shapes import random_packed
from sparse_engine.bench.timing import Replay, copies_of, take_turns, warm_up
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.progress import Track, silent
from sparse_engine.registry import Config, Kernel, Problem
from sparse_engine.tuning import Entry, Measured
from sparse_engine.value_types import PLAIN

__all__ = ["TOLERANCE", "Bucket", "Candidate", "Outcome", "buckets", "compile_all", "pending", "settle", "tune"]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest relative Frobenius error of a product against float64."""
_QUANTISED_TOLERANCE = {"int8": 2e-2, "fp8": 5e-2}
"""The same where activations are rounded to the type of the weight's values."""
_NEVER = frozenset({"reference"})
"""Kernels that are the last choice whatever their time."""
_WORTH_TURNS = 1.3
_WORTH_TURNS_OF_ITS_OWN = 1.05
_HOPELESS = 3.0
_FIRST_REPLAYS, _TURNS = 3, 9


@dataclass(frozen=True, slots=True)
class Bucket:
    """One entry of the table: ``rows`` activation rows by an (out_features, in_features) weight, its values of ``value_type``."""

    pattern: SparsityPattern
    dtype: torch.dtype
    shape: tuple[int, int]
    rows: int
    value_type: str = PLAIN

    @property
    def key(self) -> str:
        """What tables call its pattern and values."""
        return tuning.pattern_key(self.pattern, self.value_type)

    def problem(self, device: torch.device) -> Problem:
        fmt = formats.for_pattern(self.pattern)
        packed = PackedWeight(fmt.name, fmt.version, self.pattern, self.shape, self.dtype, {}, self.value_type)
        return Problem.of(packed, self.rows, device)

    def __str__(self) -> str:
        kind = f"{self.key} {str(self.dtype).removeprefix('torch.')}"
        return f"{kind} {self.shape[0]}x{self.shape[1]} M = {self.rows}"


@dataclass(slots=True)
class Outcome:
    """What a run did: ``measured`` buckets, and sentences about products that were wrong and so left out."""

    measured: int = 0
    wrong: list[str] = field(default_factory=list)


def buckets(
    shapes: Iterable[tuple[int, int]],
    patterns: Sequence[SparsityPattern],
    dtypes: Sequence[torch.dtype],
    rows: Sequence[int],
    value_type: str = PLAIN,
) -> list[Bucket]:
    """All combinations that a pattern can carry, small shapes first, the rows of one weight together."""
    ordered = sorted(dict.fromkeys(shapes), key=lambda shape: (shape[0] * shape[1], shape))
    fits = [(s, p) for s in ordered for p in patterns if not p.is_nm or s[1] % p.group[1] == 0]
    return [Bucket(p, dtype, shape, m, value_type) for shape, p in fits for dtype in dtypes for m in sorted(set(rows))]


def able(problem: Problem, only: Set[str] = frozenset()) -> list[Kernel]:
    """The kernels that are measured for ``problem``: those named ``only``, or all if there are none."""
    kernels = [k for name, k in sorted(registry.all_kernels().items()) if name not in _NEVER and (not only or name in only)]
    return [k for k in kernels if k.rejects(problem) is None]


def pending(wanted: Sequence[Bucket], device: torch.device, path: Path, only: Set[str] = frozenset()) -> list[Bucket]:
    """Those of ``wanted`` for which the table at ``path`` lacks a kernel that could run, of those named ``only`` if there are any."""
    left = []
    for bucket in wanted:
        problem = bucket.problem(device)
        assert problem.gpu is not None
        held = tuning.recorded(path, problem.gpu, bucket.key, bucket.dtype, bucket.shape, bucket.rows)
        if any(kernel.name not in held for kernel in able(problem, only)):
            left.append(bucket)
    return left


def compile_all(wanted: Sequence[Bucket], device: torch.device, only: Set[str] = frozenset(), *, track: Track = silent) -> list[str]:
    """Compile every kernel that measuring ``wanted`` needs, on all processors, into the disk cache; returns what could not be compiled."""
    needed: dict[tuple[str, str, tuple[tuple[str, int], ...]], None] = {}
    for bucket in wanted:
        problem = bucket.problem(device)
        for kernel in able(problem, only):
            for config in kernel.configs(problem):
                needed.update(dict.fromkeys(kernel.compilations(problem, config)))
    # Starting the processes takes longer than looking.
    needed = {job: None for job in needed if not cuda.is_compiled(job[0], job[1], dict(job[2]))}
    if not needed:
        return []
    # Processes, since the compiler takes turns within one.
    workers = min(os.cpu_count() or 1, len(needed))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        done = track(pool.map(_compile, needed, chunksize=2), "compiling kernels", len(needed))
        return [failure for failure in done if failure is not None]


def _compile(job: tuple[str, str, tuple[tuple[str, int], ...]]) -> str | None:
    source, arch, macros = job
    try:
        cuda.compile_cubin(source, arch, dict(macros))
    except KernelUnavailableError as error:
        return str(error)
    return None


def tune(
    wanted: Sequence[Bucket],
    device: torch.device,
    path: Path,
    *,
    only: Set[str] = frozenset(),
    seconds: float = 0.5,
    track: Track = silent,
    report: Callable[[Bucket, dict[str, Measured]], None] = lambda bucket, measured: None,
) -> Outcome:
    """Measure ``wanted`` and record it at ``path`` as soon as a weight is done.

    Args:
        only: names of the kernels to measure; all if empty.
        seconds: time per bucket for trying configurations, shared evenly by its kernels; what one leaves over goes to the next.
        report: called with each bucket's result.
    """
    outcome = Outcome()
    with torch.cuda.device(device), torch.inference_mode():
        for bucket in track(_in_groups(wanted, device, path, only, seconds, outcome, report), "tuning", len(wanted)):
            outcome.measured += bucket is not None
    return outcome


def _in_groups(
    wanted: Sequence[Bucket],
    device: torch.device,
    path: Path,
    only: Set[str],
    seconds: float,
    outcome: Outcome,
    report: Callable[[Bucket, dict[str, Measured]], None],
) -> Iterator[Bucket]:
    gpu = torch.cuda.get_device_name(device)
    for _, group in groupby(wanted, key=lambda b: (b.pattern, b.dtype, b.shape, b.value_type)):
        members = list(group)
        weight = _Weight(members, device)
        done: list[Entry] = []
        try:
            for bucket in members:
                measured, wrong = weight.measure(bucket, seconds, only)
                outcome.wrong += [f"{bucket}: {text}" for text in wrong]
                done.append(Entry(bucket.key, bucket.dtype, bucket.shape, bucket.rows, measured))
                report(bucket, measured)
                yield bucket
        finally:
            tuning.record(gpu, done, path=path)
        del weight
        torch.cuda.empty_cache()


@dataclass(slots=True, eq=False)
class Candidate:
    """A kernel in one configuration, its captured products, and its time in µs so far."""

    kernel: Kernel
    config: Config
    replay: Replay
    us: float


class _Weight:
    """A random weight of one shape, pattern and type on the device, in the layout of every kernel that may run it."""

    def __init__(self, members: Sequence[Bucket], device: torch.device) -> None:
        first = members[0]
        self.device, self.dtype, self.pattern = device, first.dtype, first.pattern
        self.packed = random_packed(first.shape, first.pattern, first.dtype, str(device), value_type=first.value_type)
        self.tolerance = _QUANTISED_TOLERANCE.get(first.value_type, TOLERANCE[first.dtype])
        most = max(bucket.rows for bucket in members)
        self.x = torch.randn(most, first.shape[1], device=device, dtype=first.dtype)
        self.bias = torch.randn(first.shape[0], device=device, dtype=first.dtype)
        unpacked = formats.get(self.packed.format).unpack(self.packed)
        self.expected = self.x.double() @ unpacked.double().T + self.bias.double()
        self.layouts: dict[str, list[dict[str, Tensor]]] = {}
        self.last_best: dict[str, Config] = {}

    def copies(self, kernel: Kernel) -> list[dict[str, Tensor]]:
        if kernel.name not in self.layouts:
            self.layouts[kernel.name] = copies_of(kernel.prepare(self.packed), self.device)
        return self.layouts[kernel.name]

    def measure(self, bucket: Bucket, seconds: float, only: Set[str] = frozenset()) -> tuple[dict[str, Measured], list[str]]:
        """The fastest configuration of every kernel, and what was wrong."""
        problem = bucket.problem(self.device)
        # Those with few configurations first: what they leave over of their share goes to the others.
        kernels, pool = sorted(able(problem, only), key=lambda k: len(k.configs(problem))), torch.cuda.graph_pool_handle()
        tried: list[Candidate] = []
        wrong: list[str] = []
        left = seconds
        for i, kernel in enumerate(kernels):
            self.copies(kernel)
            # A library's own search may take all that is left: the others have their even share of the whole nevertheless.
            begun, share = time.perf_counter(), max(left / (len(kernels) - i), seconds / len(kernels))
            configs = list(kernel.configs(problem))
            likely = self._likely(kernel, problem, configs)
            for config in dict.fromkeys([config for config in likely if config in configs] + configs):
                # What a library's search found took the share, and is not passed over for that.
                if time.perf_counter() - begun > share and config not in likely and any(c.kernel is kernel for c in tried):
                    break
                self._try(kernel, config, bucket.rows, pool, tried, wrong)
            left = max(0.0, left - (time.perf_counter() - begun))
        settled = settle(tried)
        self.last_best = {name: measured.config for name, measured in settled.items()}
        return settled, wrong

    def _likely(self, kernel: Kernel, problem: Problem, configs: Sequence[Config]) -> list[Config]:
        """What is tried first, and whatever the time: the best for the last number of rows, the one that dispatch has now, and what a
        library's search finds."""
        last = self.last_best.get(kernel.name)
        found = [*_held(kernel, problem, configs), *self._suggested(kernel, problem.rows)]
        return found if last is None else [last, *found]

    def _suggested(self, kernel: Kernel, rows: int) -> Sequence[Config]:
        try:
            return kernel.suggest(self.x[:rows], self.copies(kernel)[0], self.bias)
        except RuntimeError:
            # A library without an answer; a broken device would refuse this as well, and end the run.
            torch.cuda.synchronize()
            return ()

    def _try(self, kernel: Kernel, config: Config, rows: int, pool: object, tried: list[Candidate], wrong: list[str]) -> None:
        x, expected = self.x[:rows], self.expected[:rows]
        copies = self.copies(kernel)
        # Freed memory full of NaN is what the allocator hands out next: an element never written shows.
        torch.full_like(expected, float("nan"), dtype=self.dtype)
        try:
            y = kernel.run_config(x, copies[0], self.bias, self.pattern, config)
            error = float((y - expected).norm() / expected.norm())
            if not error < self.tolerance:
                wrong.append(f"{kernel.name} {list(config)} has a relative error of {error:.1e}")
                return
            calls = [partial(kernel.run_config, x, held, self.bias, self.pattern, config) for held in copies]
            replay = Replay(calls, pool)
        except (KernelUnavailableError, RuntimeError):
            # A library refuses what its algorithm cannot do. A broken device would refuse this as well, and end the run.
            torch.cuda.synchronize()
            return
        if not tried:
            warm_up(replay)
        us = replay.us()
        if not tried or us < _HOPELESS * min(c.us for c in tried):
            us = replay.median_us(_FIRST_REPLAYS)
        tried.append(Candidate(kernel, config, replay, us))


def _held(kernel: Kernel, problem: Problem, configs: Sequence[Config]) -> list[Config]:
    """That of ``configs`` which the tables have for ``problem``; those of an older version may lack its last fields."""
    assert problem.gpu is not None
    shape = (problem.out_features, problem.in_features)
    held = tuning.lookup(problem.gpu, problem.table_key, problem.dtype, shape, problem.rows).get(kernel.name)
    return [c for c in configs if c[: len(held.config)] == held.config][:1] if held is not None and held.config else []


def settle(tried: Sequence[Candidate]) -> dict[str, Measured]:
    """The fastest of ``tried`` for every kernel, after those that are close to the fastest, or to their kernel's, took turns."""
    if not tried:
        return {}
    best = min(c.us for c in tried)
    own = {c.kernel.name: min(o.us for o in tried if o.kernel is c.kernel) for c in tried}
    close = [c for c in tried if c.us <= _WORTH_TURNS * best or c.us <= _WORTH_TURNS_OF_ITS_OWN * own[c.kernel.name]]
    worth = [c for c in close if c.us <= _HOPELESS * best]
    times = take_turns({str(i): c.replay for i, c in enumerate(worth)}, _TURNS)
    for i, candidate in enumerate(worth):
        candidate.us = times[str(i)]
    settled: dict[str, Measured] = {}
    for candidate in sorted(tried, key=lambda c: (c not in worth, c.us)):
        settled.setdefault(candidate.kernel.name, Measured(candidate.us, candidate.config))
    return settled
