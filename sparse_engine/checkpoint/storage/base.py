"""What a way of storing pruned linears is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparse_engine import formats
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

if TYPE_CHECKING:
    from sparse_engine.checkpoint.reader import Checkpoint

__all__ = ["LayerSpec", "Storage"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One pruned linear of a checkpoint, known from its config and file headers before any tensor is read."""

    pattern: SparsityPattern
    shape: tuple[int, int]
    dtype: torch.dtype
    nnz: int
    value_type: str = PLAIN

    @property
    def format(self) -> str:
        return formats.for_pattern(self.pattern).name

    @property
    def density(self) -> float:
        """Share of stored values, from 0 to 1."""
        return self.nnz / (self.shape[0] * self.shape[1])

    @classmethod
    def of(cls, packed: PackedWeight) -> LayerSpec:
        return cls(packed.pattern, packed.shape, packed.dtype, packed.nnz, packed.value_type)


class Storage(ABC):
    """How the pruned linears of a checkpoint are named and encoded. One file in this package defines one and registers it.

    Attributes:
        name: what ``--format`` asks for.
        quant_method: ``quantization_config.quant_method`` in config.json, None where there is none.
    """

    name: ClassVar[str]
    quant_method: ClassVar[str | None]

    @abstractmethod
    def layers(self, checkpoint: Checkpoint) -> dict[str, LayerSpec]:
        """The pruned linears by name, in the checkpoint's order.

        Raises:
            CheckpointError: the config and the tensors contradict each other.
        """

    @abstractmethod
    def read(self, checkpoint: Checkpoint, linear: str) -> PackedWeight:
        """One linear's weight in its neutral packed form (not yet validated)."""

    def refuses(self, value_type: str) -> str | None:
        """Why this storage cannot hold values of that type, as a sentence, or None when it can."""
        return None

    @abstractmethod
    def encode(self, linear: str, packed: PackedWeight) -> dict[str, Tensor]:
        """The tensors, by full name, that stand for ``linear`` in a checkpoint of this storage."""

    @abstractmethod
    def config(self, config: dict[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
        """A dense model's config.json changed to declare ``layers`` stored this way."""
