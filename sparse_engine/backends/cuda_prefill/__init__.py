"""Products of more activation rows than a decode kernel takes, by a weight in a decode kernel's layout: which form of the kernel runs them.

A form is a file of this package that registers itself. The choice for a shape and a bucket of rows is the configuration measured on
this GPU where a tuning table has one (its first field is the form's name), else the form with the lowest estimate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda, tuning
from sparse_engine.backends.cuda_decode import Gpu, Streams, check_arguments, gpu
from sparse_engine.discovery import import_all
from sparse_engine.registry import ROW_BUCKETS, Config, Problem

__all__ = [
    "FEWEST_ROWS",
    "TENSOR_FLOPS_PER_US",
    "Call",
    "Compilations",
    "Form",
    "bucket_of",
    "choose",
    "compilations_of",
    "configs_of",
    "estimate_of",
    "offered",
    "parse",
    "product",
    "register",
    "run_config",
]

FEWEST_ROWS = 129
"""Activation rows from which forms are asked; fewer are one launch of a decode kernel."""
TENSOR_FLOPS_PER_US = 7.5e8
"""A common rate of dense products on an H200, for estimates."""

_ANY = Gpu("", "sm_90a", 132, True, 232448)
"""What estimates are made for where no GPU is at hand: an H200."""

Compilations = Sequence[tuple[str, str, tuple[tuple[str, int], ...]]]


@dataclass(frozen=True, slots=True)
class Call:
    """One product and its epilogue: x (..., columns) by the weight (rows, columns), plus bias (rows,), ReLU, residual (..., rows)."""

    pattern: str
    """"2:4", "4:8" or "unstructured"."""
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    rows: int
    columns: int
    relu: bool
    streams: Streams | None = None

    @property
    def m(self) -> int:
        return self.x.numel() // self.columns

    def flat(self) -> Tensor:
        """x as (m, columns), columns contiguous."""
        flat = self.x.reshape(self.m, self.columns)
        return flat if flat.stride(1) == 1 else flat.contiguous()

    def aligned(self) -> Tensor:
        """x as (m, columns), columns contiguous and rows 16-byte aligned; a copy where it is not, padded with zeros to whole 16 bytes."""
        flat, step = self.x.reshape(self.m, self.columns), 16 // self.x.element_size()
        return F.pad(flat, (0, -self.columns % step)) if self.columns % step else cuda.describable(flat)

    def finish(self, y: Tensor) -> Tensor:
        """ReLU and residual on a product that is nobody else's, in place."""
        if self.relu:
            y = torch.relu_(y)
        return y if self.residual is None else y.add_(self.residual)


class Form(ABC):
    """A way to run a :class:`Call`; stateless, registered once.

    Attributes:
        name: what configurations of tuning tables begin with.
        patterns: those it reads the layouts of.
        needs_measuring: it runs only where tuning has found it to be right and the fastest; estimates never choose it.
    """

    name: ClassVar[str]
    patterns: ClassVar[frozenset[str]]
    needs_measuring: ClassVar[bool] = False

    def unsupported(self, here: Gpu) -> str | None:
        """Why it cannot run on this GPU, or None."""
        return None

    def configs(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> Sequence[Config]:
        """What tuning measures, each beginning with :attr:`name`; the first runs where nothing was measured. None: it is not worth it."""
        return [(self.name,)]

    def understands(self, config: Config) -> bool:
        """Whether a configuration of this form's name, from a table, is of this version."""
        return True

    def compilations(self, pattern: str, dtype: torch.dtype, config: Config, here: Gpu) -> Compilations:
        """What NVRTC has to compile for a configuration."""
        return ()

    @abstractmethod
    def estimate_us(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> float:
        """Estimated time where none was measured; only its order among forms matters."""

    @abstractmethod
    def run(self, call: Call, config: Config) -> Tensor:
        """The product, on the current device and stream.

        Raises:
            KernelUnavailableError: ``config`` is none of :meth:`configs`, or cannot be compiled or launched.
        """


_FORMS: dict[str, Form] = {}


def register(form: Form) -> None:
    """Make a form known under its name; called once at the end of its file."""
    _FORMS[form.name] = form


@cache
def _forms(pattern: str, here: Gpu) -> tuple[Form, ...]:
    import_all(__name__)
    return tuple(form for _, form in sorted(_FORMS.items()) if pattern in form.patterns and form.unsupported(here) is None)


def parse(pattern: str, config: Config, here: Gpu) -> Form | None:
    """The form that a configuration names, or None where it is a decode kernel's or of another version."""
    return next((form for form in _forms(pattern, here) if config and form.name == config[0] and form.understands(config)), None)


def offered(pattern: str, rows: int, columns: int, m: int, here: Gpu) -> list[tuple[Form, Sequence[Config]]]:
    """The forms that are worth measuring for m activation rows, with their configurations, those of the lowest estimates first."""
    found = [(form, form.configs(pattern, rows, columns, m, here)) for form in _forms(pattern, here)]
    worth = [(form, configs) for form, configs in found if configs]
    return sorted(worth, key=lambda each: each[0].estimate_us(pattern, rows, columns, m, here))


def bucket_of(m: int) -> int:
    """The number of rows that measurements for m rows are looked up under."""
    return next((rows for rows in ROW_BUCKETS if m <= rows), ROW_BUCKETS[-1])


@cache
def choose(kernel: str, pattern: str, dtype: torch.dtype, rows: int, columns: int, bucket: int, here: Gpu) -> tuple[Form, Config]:
    """Form and configuration for a bucket of activation rows."""
    measured = tuning.lookup(here.name, pattern, dtype, (rows, columns), bucket).get(kernel)
    if measured is not None and (form := parse(pattern, measured.config, here)) is not None:
        return form, measured.config
    form, own = _estimated(pattern, rows, columns, bucket, here)[0]
    return form, own[0]


def _estimated(pattern: str, rows: int, columns: int, m: int, here: Gpu) -> list[tuple[Form, Sequence[Config]]]:
    return [each for each in offered(pattern, rows, columns, m, here) if not each[0].needs_measuring]


def product(kernel: str, call: Call) -> Tensor:
    """Run ``call`` with the form and configuration chosen for its shape and rows; ``kernel`` is the name that tables have them under.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the form cannot be compiled or launched.
    """
    check_arguments(call.x, call.weight, call.bias, call.residual, call.rows, call.columns)
    here = gpu(call.x.device.index)
    form, config = choose(kernel, call.pattern, call.x.dtype, call.rows, call.columns, bucket_of(call.m), here)
    with torch.cuda.device(call.x.device):
        return form.run(call, config)


def run_config(call: Call, config: Config) -> Tensor | None:
    """Run ``call`` as ``config`` says, or None where that names no form."""
    form = parse(call.pattern, config, gpu(call.x.device.index))
    return form.run(call, config) if form is not None else None


def _here() -> Gpu:
    return gpu(torch.cuda.current_device()) if torch.cuda.is_available() else _ANY


def _asked(problem: Problem) -> tuple[str, int, int, int, Gpu]:
    return tuning.pattern_key(problem.pattern), problem.out_features, problem.in_features, problem.rows, _here()


def configs_of(problem: Problem) -> list[Config]:
    """What tuning measures for ``problem``: the configurations of every form."""
    return [config for _, configs in offered(*_asked(problem)) for config in configs]


def compilations_of(problem: Problem, config: Config) -> Compilations:
    """What NVRTC has to compile for a configuration."""
    pattern, *_, here = _asked(problem)
    form = parse(pattern, config, here)
    return form.compilations(pattern, problem.dtype, config, here) if form is not None else ()


def estimate_of(problem: Problem) -> float:
    """The lowest estimate of any form, as for an H200 where no GPU is at hand."""
    asked = _asked(problem)
    return _estimated(*asked)[0][0].estimate_us(*asked)
