"""What a model family tells the converter: names, shapes, and how to run one layer at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["ModelFamily"]


class ModelFamily(ABC):
    """Adapter for one architecture. One file in this package defines one and registers it.

    Attributes:
        model_types: ``model_type`` values of config.json, dense and packed.
        linear_groups: the prunable linears of a layer, relative to its prefix, in the order of the data flow; linears of
            one group read the same input, so that they share their statistics.
    """

    model_types: ClassVar[tuple[str, ...]]
    linear_groups: ClassVar[tuple[tuple[str, ...], ...]]

    @abstractmethod
    def validate(self, config: Mapping[str, Any]) -> None:
        """Check the numbers that sizes are computed from.

        Raises:
            CheckpointError: one is missing, not positive, or contradicts another.
        """

    @abstractmethod
    def canonical(self, name: str) -> str:
        """The full tensor name for one that a file may store without its prefix."""

    @abstractmethod
    def layer_count(self, config: Mapping[str, Any]) -> int: ...

    @abstractmethod
    def layer_prefix(self, index: int) -> str:
        """Prefix of all names of layer ``index``, without the final dot."""

    @abstractmethod
    def linear_shape(self, config: Mapping[str, Any], linear: str) -> tuple[int, int]:
        """(out_features, in_features) of a linear given by its full name.

        Raises:
            CheckpointError: the family has no such linear.
        """

    @abstractmethod
    def drops(self, config: Mapping[str, Any], name: str) -> bool:
        """Whether tensor ``name`` is redundant in a new checkpoint (a tied output head)."""

    @abstractmethod
    def max_length(self, config: Mapping[str, Any]) -> int:
        """Most tokens in one sequence."""

    @abstractmethod
    def dense_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` as the dense model's: no packing declared."""

    @abstractmethod
    def embed(self, config: Mapping[str, Any], tensor: Callable[[str], Tensor], *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A module from token ids int64 (1, T) to the first layer's input (1, T, hidden)."""

    @abstractmethod
    def build_layer(self, config: Mapping[str, Any], index: int, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Decoder layer ``index`` with uninitialised weights, in evaluation mode."""

    @abstractmethod
    def run_layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The layer's output (1, T, hidden) with causal attention and no padding."""

    def linears(self, config: Mapping[str, Any]) -> list[str]:
        """Full names of all prunable linears, layer by layer."""
        names = [name for group in self.linear_groups for name in group]
        return [f"{self.layer_prefix(i)}.{name}" for i in range(self.layer_count(config)) for name in names]
