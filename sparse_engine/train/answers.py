"""The teacher's own summaries as training answers, made once per run and kept, so that a resumed run learns from the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparse_engine.data.pairs import Pair
from sparse_engine.evaluate.generate import PREDICTIONS, generate_summaries, read_predictions
from sparse_engine.progress import Track, silent
from sparse_engine.train.settings import FinetuneSettings

__all__ = ["teacher_pairs"]

_BATCH = {"cuda": 64, "cpu": 8}


def teacher_pairs(
    teacher: Path,
    tokenizer: Any,
    pairs: Sequence[Pair],
    settings: FinetuneSettings,
    folder: Path,
    *,
    device: torch.device,
    track: Track = silent,
) -> list[Pair]:
    """The training examples that ``settings.answers`` asks for: references, the teacher's greedy summaries, or both of each text.

    Sequence-level knowledge distillation (Kim & Rush 2016, "Sequence-Level Knowledge Distillation", section 3.2) with one beam. A
    text for which the teacher writes nothing keeps its reference.

    Args:
        teacher: a dense checkpoint's directory.
        folder: keeps the summaries, which are taken from there when they are whole and gone on with when they are not.
    """
    if settings.answers == "reference":
        return list(pairs)
    limits = {"max_new_tokens": settings.max_summary_tokens, "max_text_tokens": settings.max_text_tokens}
    if (folder / PREDICTIONS).exists():
        made = read_predictions(folder / PREDICTIONS)
    else:
        made = generate_summaries(
            _loaded(teacher, device), tokenizer, pairs, folder, batch_size=_BATCH.get(device.type, 8), track=track, **limits
        )
    taught = [replace(pair, summary=found.prediction or pair.summary) for pair, found in zip(pairs, made, strict=True)]
    return taught if settings.answers == "teacher" else [*pairs, *taught]


def _loaded(teacher: Path, device: torch.device) -> Any:
    from sparse_engine.hf.loading import load_model

    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return load_model(teacher, backend=None, dtype=dtype, device=device)
