"""Masks: which weights of one linear layer are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern

__all__ = ["Mask"]


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The kept weights of one (rows, columns) matrix under a pattern.

    Args:
        pattern: what the mask promises.
        keep: bool tensor (rows, columns), True where the weight is kept.

    Raises:
        InputError: ``keep`` is not a 2-D bool tensor, or a group of an N:M pattern does not keep exactly N.
    """

    pattern: SparsityPattern
    keep: Tensor

    def __post_init__(self) -> None:
        if self.keep.dtype is not torch.bool or self.keep.dim() != 2:
            raise InputError(f"a mask is a 2-D bool tensor, got {self.keep.dtype} of shape {tuple(self.keep.shape)}")
        if not self.pattern.is_nm:
            return
        rows, columns = self.keep.shape
        self.pattern.check_shape((rows, columns), "mask")
        n, m = self.pattern.group
        kept = self.keep.view(rows, columns // m, m).sum(-1, dtype=torch.int32)
        if bool((kept != n).any()):
            row, group = (int(i) for i in torch.nonzero(kept != n)[0])
            columns_named = f"row {row}, columns {group * m} to {group * m + m - 1}"
            raise InputError(f"mask keeps {int(kept[row, group])} weights in {columns_named}, where {self.pattern} keeps {n}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.keep.shape[0], self.keep.shape[1]

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return int(self.keep.sum())

    def apply(self, weight: Tensor) -> Tensor:
        """A copy of ``weight`` with removed entries and every -0.0 set to +0.0, so that equal weights have equal bytes."""
        return torch.where(self.keep & (weight != 0), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
