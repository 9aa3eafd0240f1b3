"""Fine-tuning that keeps a pruned model pruned: full, QLoRA, LoRA under the mask, and all kept weights with distillation."""

from __future__ import annotations

from sparse_engine.train.settings import METHODS, FinetuneSettings

__all__ = ["METHODS", "FinetuneSettings"]
