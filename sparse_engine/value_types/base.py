"""What a type of packed values is: how kept weights become levels and scales, how levels lie in memory, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["TensorSpec", "ValueType"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and type that one tensor of a packed weight must have."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class ValueType(ABC):
    """One file in this package defines one value type and registers an instance of it.

    A weight (rows, columns) is stored as ``values``, one *level* per kept position row by row in column order, beside the tensors
    of :meth:`scale_specs`.

    Attributes:
        slots: levels in one element of ``values``; a row's levels fill whole elements, the rest of its last element is zero.
        bits: of one level.
    """

    name: ClassVar[str]
    slots: ClassVar[int] = 1
    bits: ClassVar[int]

    @abstractmethod
    def element(self, dtype: torch.dtype) -> torch.dtype:
        """Type of ``values`` for a weight of ``dtype``."""

    @abstractmethod
    def scale_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Tensors beside ``values`` for a (rows, columns) weight."""

    @abstractmethod
    def quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Levels (rows, columns) of a masked ``weight``, removed positions zero, and the tensors of :meth:`scale_specs`."""

    @abstractmethod
    def dequantise(self, levels: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight (rows, columns) in ``dtype``, rounded once, that ``levels`` stand for; may change ``levels``."""

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with values or scales that came from outside, in shapes that were checked, or None."""
        return None

    def store(self, levels: Tensor, counts: Tensor) -> Tensor:
        """``values`` of the kept ``levels`` (nnz,); ``counts`` int64 (rows,) of them belong to each row."""
        return levels

    def load(self, values: Tensor, counts: Tensor) -> Tensor:
        """The kept levels (nnz,): the inverse of :meth:`store`."""
        return values.flatten()
