"""The kernel registry: which kernel runs a packed product, and why each other one does not.

A *problem* is a product y = x Wᵀ + b with everything that the choice may depend on. Kernels are files in
``sparse_engine/backends``; each registers itself, says which problems it rejects and estimates its time. The choice is a
pure function of the problem and the measured times of :mod:`sparse_engine.tuning`, made when layers are swapped in and never in the hot
path: where kernels of a problem were measured on this GPU the fastest of them runs, else the one with the lowest estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine import tuning, value_types
from sparse_engine.discovery import import_all
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.levels import TokenLevels
from sparse_engine.pattern import SparsityPattern
from sparse_engine.policy import UNLIMITED, Policy
from sparse_engine.tuning import Config
from sparse_engine.value_types import PLAIN

__all__ = [
    "DECODE_ROWS",
    "DENSE_GAIN",
    "ESTIMATE",
    "PROMPT_GAIN",
    "ROW_BUCKETS",
    "Config",
    "Kernel",
    "Layout",
    "Problem",
    "Verdict",
    "all_kernels",
    "dense_gain",
    "explain",
    "get",
    "register",
    "select",
]

ESTIMATE = "estimate"
"""Source of a time that nobody measured; the others are those of :mod:`sparse_engine.tuning`."""

DENSE_GAIN = 1.02
"""A dense copy must be faster than the best packed kernel by more than this factor."""

PROMPT_GAIN = 1.08
"""The same for more rows than a decode step has: a prompt is read once, and a weight that lies in memory twice for it is no smaller than
the dense one. By this much 4:8 prompts of wide models take 3 % longer than dense ones, over all lengths and layers, on an H200."""

DECODE_ROWS = 128
"""Most rows of a decode step."""

Layout = Mapping[str, Tensor]
"""Tensors in the form that a kernel reads; for an in-place kernel the packed tensors themselves."""

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Numbers of activation rows at which the choice of kernel is made; more rows than the last use the last."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One product: x (rows, in_features) by a packed weight (out_features, in_features).

    ``capability`` is the CUDA compute capability, such as (9, 0), and ``gpu`` the name that measured times are kept under; both are
    None off CUDA.
    """

    format: str
    pattern: SparsityPattern
    dtype: torch.dtype
    device: str
    out_features: int
    in_features: int
    rows: int
    capability: tuple[int, int] | None = None
    gpu: str | None = None
    value_type: str = PLAIN

    @classmethod
    def of(cls, packed: PackedWeight, rows: int, device: torch.device | str | None = None) -> Problem:
        """The problem of multiplying ``rows`` activation rows by ``packed`` on ``device`` (default: where it lies)."""
        place = torch.device(device) if device is not None else packed.tensors["values"].device
        capability = torch.cuda.get_device_capability(place) if place.type == "cuda" else None
        gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else None
        return cls(packed.format, packed.pattern, packed.dtype, place.type, *packed.shape, rows, capability, gpu, packed.value_type)

    def with_rows(self, rows: int) -> Problem:
        return replace(self, rows=rows)

    def measured(self) -> Mapping[str, tuning.Measured]:
        """What this GPU's tables say of this problem, by kernel."""
        if self.gpu is None:
            return {}
        return tuning.lookup(self.gpu, self.table_key, self.dtype, (self.out_features, self.in_features), self.rows)

    @property
    def table_key(self) -> str:
        """What tuning tables call its pattern and values."""
        return tuning.pattern_key(self.pattern, self.value_type)

    @property
    def packed_nbytes(self) -> float:
        """Bytes of values and bitmask, from the pattern's density."""
        value_nbytes = (value_types.get(self.value_type).bits or 8 * self.dtype.itemsize) / 8
        return self.out_features * self.in_features * (self.pattern.density * value_nbytes + 1 / 8)

    @property
    def dense_nbytes(self) -> int:
        return self.out_features * self.in_features * self.dtype.itemsize


class Kernel(ABC):
    """One way to run a packed product. A file in ``sparse_engine/backends`` defines it and registers an instance.

    Attributes:
        name: unique; what ``backend=`` asks for and ``inspect`` prints.
        formats, devices, value_types, dtypes: what :meth:`rejects` checks before asking :meth:`unsupported`.
        in_place: the kernel reads the packed tensors as they are. If False, :meth:`prepare` builds a layout of its own and
            the packed tensors are released from the device; :meth:`recover` gives them back for saving.
        keeps_dense: its layout is as large as the dense weight, so that it is chosen only where it was measured to be faster than
            the best packed kernel and the policy allows it.
        types_alike: bf16 and fp16 take the same time, so that a time measured with one stands in for the other's.
    """

    name: ClassVar[str]
    formats: ClassVar[frozenset[str]]
    devices: ClassVar[frozenset[str]]
    value_types: ClassVar[frozenset[str]] = frozenset({PLAIN})
    dtypes: ClassVar[frozenset[torch.dtype]]
    in_place: ClassVar[bool] = True
    keeps_dense: ClassVar[bool] = False
    types_alike: ClassVar[bool] = True

    def rejects(self, problem: Problem) -> str | None:
        """Why this kernel cannot run ``problem`` (a phrase that can follow its name), or None when it can."""
        if problem.format not in self.formats:
            return f"reads format {' or '.join(sorted(self.formats))}, not {problem.format}"
        if problem.device not in self.devices:
            return f"runs on {' or '.join(sorted(self.devices))}, not {problem.device}"
        if problem.value_type not in self.value_types:
            return f"reads {' or '.join(sorted(self.value_types))} values, not {problem.value_type} ones"
        if problem.dtype not in self.dtypes:
            return f"has no {str(problem.dtype).removeprefix('torch.')} form"
        return self.unsupported(problem)

    def unsupported(self, problem: Problem) -> str | None:
        """Further reasons, checked once format, device and types fit."""
        return None

    def __reduce__(self) -> tuple[Callable[[str], Kernel], tuple[str]]:
        # A copied or pickled layer holds the registered kernel again: it may own libraries that cannot be copied.
        return get, (self.name,)

    @abstractmethod
    def cost(self, problem: Problem) -> float:
        """Estimated time in µs where none was measured; only its order among kernels matters."""

    def configs(self, problem: Problem) -> Sequence[Config]:
        """The configurations that tuning measures for ``problem``; a kernel without any has one, the empty one."""
        return ((),)

    def suggest(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Sequence[Config]:
        """Configurations that a library's own search finds for these tensors, which tuning measures before the others."""
        return ()

    def compilations(self, problem: Problem, config: Config) -> Sequence[tuple[str, str, tuple[tuple[str, int], ...]]]:
        """The (source, arch, macros) of :func:`cuda.compile_cubin` that running ``config`` needs, so that tuning compiles them at once."""
        return ()

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int | None:
        """Bytes that this kernel's layout of ``packed`` takes, padding included, or None where only :meth:`prepare` can tell."""
        return packed.nbytes if self.in_place else None

    def prepare(self, packed: PackedWeight) -> Layout:
        """The tensors that :meth:`run` reads, on the packed weight's device."""
        return packed.tensors

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        """The packed weight that ``layout`` was prepared from; ``packed`` holds its description and no tensors."""
        return replace(packed, tensors=layout)

    @abstractmethod
    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        """x (..., in_features) by the layout's weight, plus bias (out_features,); gives (..., out_features)."""

    def run_fused(
        self,
        x: Tensor,
        layout: Layout,
        bias: Tensor | None,
        pattern: SparsityPattern,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """:meth:`run`, then ReLU, then + ``residual`` (..., out_features): a kernel with an epilogue does it there."""
        y = self.run(x, layout, bias, pattern)
        if relu:
            y = torch.relu(y)
        return y if residual is None else y + residual

    def levels_of(self, layout: Layout) -> torch.dtype | None:
        """The type of the 8-bit levels that the kernel makes of x, which :meth:`run_levels` takes ready made; None: it makes none."""
        return None

    def run_levels(
        self,
        tokens: TokenLevels,
        layout: Layout,
        bias: Tensor | None,
        pattern: SparsityPattern,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """:meth:`run_fused` of activations that are levels already, of the type of :meth:`levels_of`.

        Raises:
            KernelUnavailableError: the kernel takes none.
        """
        raise KernelUnavailableError(f"{self.name} takes no activations that are levels")

    def relu_norm(self, layout: Layout) -> Tensor | None:
        """Float32 (1,), the largest norm of a row of the weight, where the kernel has :meth:`relu_levels` for some numbers of rows."""
        return None

    def leaves_levels(self, layout: Layout, rows: int, dtype: torch.dtype) -> bool:
        """Whether :meth:`relu_levels` takes so many rows of activations of type ``dtype``."""
        return False

    def relu_levels(self, tokens: TokenLevels, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> TokenLevels:
        """ReLU of the product as levels of the type of ``tokens``, whose scales are the tokens' ``ahead``.

        Raises:
            InputError: the tokens have no such scales.
            KernelUnavailableError: the kernel leaves none.
        """
        raise KernelUnavailableError(f"{self.name} leaves no levels")

    @property
    def has_rows(self) -> bool:
        """Whether :meth:`rows_of` ever gives a layout."""
        return type(self).rows_of is not Kernel.rows_of

    def rows_of(self, layout: Layout, begin: int, end: int) -> Layout | None:
        """Views of ``layout`` that are the layout of output rows begin … end - 1 alone, or None where it cannot be cut there."""
        return None

    def run_config(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern, config: Config) -> Tensor:
        """:meth:`run` with one of :meth:`configs` instead of the kernel's own choice; for tuning, which times it."""
        return self.run(x, layout, bias, pattern)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the registry thinks of one kernel for one problem: a ``reason`` against it, and its time ``cost`` in µs where it could run.

    ``source`` says where the time is from: :data:`ESTIMATE`, ``tuning.SHIPPED`` or ``tuning.USER``; ``config`` is what was measured.
    """

    kernel: str
    reason: str | None
    cost: float | None
    chosen: bool
    source: str | None = None
    config: Config = ()


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


def select(problem: Problem, backend: str | None = None, policy: Policy = UNLIMITED) -> Kernel:
    """The kernel for ``problem``: the one named ``backend``, else the fastest that does not reject it.

    Raises:
        InputError: no kernel is called ``backend``.
        KernelUnavailableError: ``backend``, or every kernel, rejects the problem; the message says why.
    """
    if backend is not None:
        kernel = get(backend)
        if reason := kernel.rejects(problem):
            raise KernelUnavailableError(f"backend {backend} cannot run this product: it {reason}")
        return kernel
    verdicts = explain(problem, policy)
    for verdict in verdicts:
        if verdict.chosen:
            return get(verdict.kernel)
    raise KernelUnavailableError("no kernel can run this product: " + "; ".join(f"{v.kernel} {v.reason}" for v in verdicts))


def explain(problem: Problem, policy: Policy = UNLIMITED) -> list[Verdict]:
    """A verdict for every registered kernel, the chosen one first, then the other able ones, then the rejected.

    Able kernels are in order of time, those that were measured on this GPU before those with an estimate only.
    """
    kernels, measured = all_kernels(), problem.measured()
    able: list[Verdict] = []
    rejected: list[Verdict] = []
    for name, kernel in sorted(kernels.items()):
        if reason := kernel.rejects(problem):
            rejected.append(Verdict(name, reason, None, chosen=False))
        elif (found := measured.get(name)) is not None and (kernel.types_alike or not found.stands_in):
            able.append(Verdict(name, None, found.us, chosen=False, source=found.source, config=found.config))
        else:
            able.append(Verdict(name, None, kernel.cost(problem), chosen=False, source=ESTIMATE))
    able.sort(key=lambda verdict: (verdict.source == ESTIMATE, verdict.cost, verdict.kernel))
    packed = next((verdict for verdict in able if not kernels[verdict.kernel].keeps_dense), None)
    for verdict in [verdict for verdict in able if kernels[verdict.kernel].keeps_dense]:
        if reason := policy.forbids(problem) or _no_gain(verdict, packed, problem.rows):
            able.remove(verdict)
            rejected.append(replace(verdict, reason=reason))
    return [replace(verdict, chosen=i == 0) for i, verdict in enumerate(able)] + rejected


def dense_gain(rows: int) -> float:
    """The factor by which a dense copy must be faster than the best packed kernel at ``rows`` activation rows."""
    return DENSE_GAIN if rows <= DECODE_ROWS else PROMPT_GAIN


def _no_gain(dense: Verdict, packed: Verdict | None, rows: int) -> str | None:
    if dense.source == ESTIMATE:
        return "keeps a dense copy, and was not measured for this product"
    assert dense.cost is not None
    gain = dense_gain(rows)
    if packed is not None and packed.cost is not None and packed.cost <= gain * dense.cost:
        return f"keeps a dense copy, and is not more than {gain - 1:.0%} faster than {packed.kernel}"
    return None
