"""Masked dense weights: nothing is gained in size, but every tool loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_engine import formats
from sparse_engine.checkpoint.storage import register
from sparse_engine.checkpoint.storage.base import LayerSpec, Storage
from sparse_engine.errors import CheckpointError
from sparse_engine.formats.base import PackedWeight

if TYPE_CHECKING:
    from sparse_engine.checkpoint.reader import Checkpoint


class DenseStorage(Storage):
    name = "dense"
    quant_method = None

    def layers(self, checkpoint: Checkpoint) -> dict[str, LayerSpec]:
        return {}

    def read(self, checkpoint: Checkpoint, linear: str) -> PackedWeight:
        raise CheckpointError(f"{linear} is dense in {checkpoint.path}; prune it first with `sparse-engine convert --nm 2:4`")

    def encode(self, linear: str, packed: PackedWeight) -> dict[str, Tensor]:
        return {f"{linear}.weight": formats.get(packed.format).unpack(packed)}

    def config(self, config: dict[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Any]:
        return dict(config)


register(DenseStorage())
