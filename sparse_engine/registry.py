"""The kernel registry: which kernel runs a packed product, and why each other one does not.

A *problem* is a product y = x Wᵀ + b with everything that the choice may depend on. Kernels are files in
``sparse_engine/backends``; each registers itself, says which problems it rejects and estimates its time. The choice is a
pure function of the problem, made when layers are swapped in and never in the hot path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine.discovery import import_all
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern

__all__ = ["ROW_BUCKETS", "Kernel", "Layout", "Problem", "Verdict", "all_kernels", "explain", "get", "register", "select"]

Layout = Mapping[str, Tensor]
"""Tensors in the form that a kernel reads; for an in-place kernel the packed tensors themselves."""

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
"""Numbers of activation rows at which the choice of kernel is made; more rows than the last use the last."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One product: x (rows, in_features) by a packed weight (out_features, in_features).

    ``capability`` is the CUDA compute capability, such as (9, 0), and None off CUDA.
    """

    format: str
    pattern: SparsityPattern
    dtype: torch.dtype
    device: str
    out_features: int
    in_features: int
    rows: int
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, packed: PackedWeight, rows: int, device: torch.device | str | None = None) -> Problem:
        """The problem of multiplying ``rows`` activation rows by ``packed`` on ``device`` (default: where it lies)."""
        place = torch.device(device) if device is not None else packed.tensors["values"].device
        capability = torch.cuda.get_device_capability(place) if place.type == "cuda" else None
        return cls(packed.format, packed.pattern, packed.dtype, place.type, *packed.shape, rows, capability)

    def with_rows(self, rows: int) -> Problem:
        return replace(self, rows=rows)

    @property
    def packed_nbytes(self) -> float:
        """Bytes of values and bitmask, from the pattern's density."""
        return self.out_features * self.in_features * (self.pattern.density * self.dtype.itemsize + 1 / 8)

    @property
    def dense_nbytes(self) -> int:
        return self.out_features * self.in_features * self.dtype.itemsize


class Kernel(ABC):
    """One way to run a packed product. A file in ``sparse_engine/backends`` defines it and registers an instance.

    Attributes:
        name: unique; what ``backend=`` asks for and ``inspect`` prints.
        formats, devices, dtypes: what :meth:`rejects` checks before asking :meth:`unsupported`.
        in_place: the kernel reads the packed tensors as they are. If False, :meth:`prepare` builds a layout of its own and
            the packed tensors are released from the device; :meth:`recover` gives them back for saving.
    """

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    devices: ClassVar[frozenset[str]]
    dtypes: ClassVar[frozenset[torch.dtype]]
    in_place: ClassVar[bool] = True

    def rejects(self, problem: Problem) -> str | None:
        """Why this kernel cannot run ``problem`` (a phrase that can follow its name), or None when it can."""
        if problem.format not in self.formats:
            return f"reads format {' or '.join(sorted(self.formats))}, not {problem.format}"
        if problem.device not in self.devices:
            return f"runs on {' or '.join(sorted(self.devices))}, not {problem.device}"
        if problem.dtype not in self.dtypes:
            return f"has no {str(problem.dtype).removeprefix('torch.')} form"
        return self.unsupported(problem)

    def unsupported(self, problem: Problem) -> str | None:
        """Further reasons, checked once format, device and type fit."""
        return None

    def __reduce__(self) -> tuple[Callable[[str], Kernel], tuple[str]]:
        # A copied or pickled layer holds the registered kernel again: it may own libraries that cannot be copied.
        return get, (self.name,)

    @abstractmethod
    def cost(self, problem: Problem) -> float:
        """Estimated time in µs; only its order among kernels matters."""

    def prepare(self, packed: PackedWeight) -> Layout:
        """The tensors that :meth:`run` reads, on the packed weight's device."""
        return packed.tensors

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        """The packed weight that ``layout`` was prepared from; ``packed`` holds its description and no tensors."""
        return PackedWeight(packed.format, packed.version, packed.pattern, packed.shape, packed.dtype, layout)

    @abstractmethod
    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        """x (..., in_features) by the layout's weight, plus bias (out_features,); gives (..., out_features)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the registry thinks of one kernel for one problem: a ``reason`` against it, or its ``cost`` in µs."""

    kernel: str
    reason: str | None
    cost: float | None
    chosen: bool


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> None:
    """Make a kernel known under its name; called once at the end of its file."""
    _KERNELS[kernel.name] = kernel


@cache
def _discover() -> None:
    import_all("sparse_engine.backends")


def all_kernels() -> dict[str, Kernel]:
    _discover()
    return dict(_KERNELS)


def get(name: str) -> Kernel:
    """The kernel called ``name``.

    Raises:
        InputError: there is none.
    """
    kernels = all_kernels()
    if name not in kernels:
        raise InputError(f"unknown backend {name!r}; known: {', '.join(sorted(kernels))}")
    return kernels[name]


def select(problem: Problem, backend: str | None = None) -> Kernel:
    """The kernel for ``problem``: the one named ``backend``, else the cheapest that does not reject it.

    Raises:
        InputError: no kernel is called ``backend``.
        KernelUnavailableError: ``backend``, or every kernel, rejects the problem; the message says why.
    """
    if backend is not None:
        kernel = get(backend)
        if reason := kernel.rejects(problem):
            raise KernelUnavailableError(f"backend {backend} cannot run this product: it {reason}")
        return kernel
    verdicts = explain(problem)
    for verdict in verdicts:
        if verdict.chosen:
            return get(verdict.kernel)
    raise KernelUnavailableError("no kernel can run this product: " + "; ".join(f"{v.kernel} {v.reason}" for v in verdicts))


def explain(problem: Problem) -> list[Verdict]:
    """A verdict for every registered kernel, the chosen one first, then the other able ones by cost, then the rejected."""
    able: list[tuple[float, str]] = []
    rejected: list[Verdict] = []
    for name, kernel in sorted(all_kernels().items()):
        if reason := kernel.rejects(problem):
            rejected.append(Verdict(name, reason, None, chosen=False))
        else:
            able.append((kernel.cost(problem), name))
    able.sort()
    return [Verdict(name, None, cost, chosen=i == 0) for i, (cost, name) in enumerate(able)] + rejected
