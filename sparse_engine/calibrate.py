"""What calibration gathers about the inputs of one linear layer: their norms, or the whole layer-wise Hessian.

Each accumulator takes activations in any number of pieces and holds only what its pruner reads. Nothing waits for the
device during :meth:`Statistics.update`: a NaN or infinite input shows when a statistic is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_engine.errors import InputError
from sparse_engine.pruners.base import Needs

__all__ = ["Hessian", "InputNorms", "Statistics", "full_fp32_matmul", "statistics_for"]

CHUNK_ELEMENTS = 1 << 24
"""Activations cast to fp32 at once: 64 MiB."""


class Statistics:
    """Counts tokens, which is all that a pruner needing nothing has; the subclasses gather more.

    Args:
        columns: input features of the layer.
        device: where the accumulators lie; activations are moved there.
        name: what error messages call the layer.

    Attributes:
        count: tokens seen.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", name: str = "the layer") -> None:
        self.columns, self.device, self.name = columns, torch.device(device), name
        self.count = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the activations ``x`` (..., columns) of any float type; leading dimensions are tokens.

        Raises:
            InputError: the last dimension is not ``columns``.
        """
        if x.dim() == 0 or x.shape[-1] != self.columns:
            raise InputError(f"calibration input of {self.name} is {tuple(x.shape)}, expected {self.columns} in its last dimension")
        tokens = x.reshape(-1, self.columns)
        step = max(1, CHUNK_ELEMENTS // self.columns)
        for start in range(0, tokens.shape[0], step):
            self._add(tokens[start : start + step].to(self.device, torch.float32))
        self.count += tokens.shape[0]

    def _add(self, x: Tensor) -> None:
        """Add fp32 tokens ``x`` (tokens, columns)."""

    @property
    def norms(self) -> Tensor:
        """fp32 (columns,): ‖x_j‖₂ of each input feature over all tokens.

        Raises:
            InputError: not gathered by this accumulator, no token seen, or not finite.
        """
        raise InputError(f"the statistics of {self.name} hold no {Needs.INPUT_NORMS.value}")

    def _checked(self, values: Tensor) -> Tensor:
        if not self.count:
            raise InputError(f"the statistics of {self.name} are empty: no calibration token reached it")
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"calibration input of {self.name} holds NaN or infinite values, or ones too large to square in fp32")
        return values


class InputNorms(Statistics):
    """fp32 (columns,) sums of squares."""

    def __init__(self, columns: int, device: torch.device | str = "cpu", name: str = "the layer") -> None:
        super().__init__(columns, device, name)
        self._squares = torch.zeros(columns, dtype=torch.float32, device=self.device)

    def _add(self, x: Tensor) -> None:
        self._squares += x.square().sum(0)

    @property
    def norms(self) -> Tensor:
        return self._checked(self._squares).sqrt()


class Hessian(Statistics):
    """fp32 (columns, columns): H = mean over tokens of 2 x xᵀ.

    It is the Hessian of the squared output error ‖Wx - Ŵx‖² in each row of Ŵ (Frantar & Alistarh 2023, section 3).
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", name: str = "the layer") -> None:
        super().__init__(columns, device, name)
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=self.device)
        # H is symmetric: only panels on and right of the diagonal are computed, 9/16 of the products.
        panel = max(256, -(-columns // 8))
        self._panels = [slice(start, min(start + panel, columns)) for start in range(0, columns, panel)]

    def _add(self, x: Tensor) -> None:
        with full_fp32_matmul():
            for panel in self._panels:
                self._sum[panel, panel.start :].addmm_(x[:, panel].T, x[:, panel.start :])

    @property
    def norms(self) -> Tensor:
        return self._checked(self._sum.diagonal()).sqrt()

    @property
    def matrix(self) -> Tensor:
        """A fresh fp32 (columns, columns) H, symmetric to the bit.

        Raises:
            InputError: no token seen, or not finite.
        """
        full = self._checked(self._sum) * (2.0 / self.count)
        for panel in self._panels:
            square = full[panel, panel]
            square.copy_(square.triu() + square.triu(1).T)
            full[panel.stop :, panel] = full[panel, panel.stop :].T
        return full


@contextmanager
def full_fp32_matmul() -> Iterator[None]:
    """Run fp32 products in true fp32 inside the block, whatever the user allows elsewhere; TF32 keeps 10 bits, too few for H."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # set on import, unseen by mypy
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


_ACCUMULATORS: dict[Needs, type[Statistics]] = {Needs.NOTHING: Statistics, Needs.INPUT_NORMS: InputNorms, Needs.HESSIAN: Hessian}


def statistics_for(needs: Needs, columns: int, device: torch.device | str = "cpu", name: str = "the layer") -> Statistics:
    """An empty accumulator of what a pruner ``needs`` for a layer with ``columns`` input features."""
    return _ACCUMULATORS[needs](columns, device, name)
