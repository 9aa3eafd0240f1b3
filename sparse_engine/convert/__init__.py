"""The converter: a checkpoint in, a pruned and packed checkpoint out, layer by layer, resumable, written whole."""

from __future__ import annotations

from sparse_engine.convert.pipeline import ConvertReport, convert

__all__ = ["ConvertReport", "convert"]
