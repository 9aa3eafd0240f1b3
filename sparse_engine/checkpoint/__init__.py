"""Checkpoints on disk: where they are, how each way of storing a pruned linear is read, and how a new one is written whole."""

from __future__ import annotations

from sparse_engine.checkpoint.hub import resolve
from sparse_engine.checkpoint.reader import Checkpoint
from sparse_engine.checkpoint.storage.base import LayerSpec

__all__ = ["Checkpoint", "LayerSpec", "resolve"]
