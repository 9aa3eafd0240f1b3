"""Perplexity of a causal language model, over windows of one long text or over documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine.errors import InputError
from sparse_engine.progress import Track, silent

__all__ = ["Perplexity", "document_perplexity", "window_perplexity"]

_LOSS_ROWS = 256
"""Positions whose logits are widened to fp32 at a time: with a vocabulary of 50,000 all 2,048 would take 400 MB."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``nll``: negative log likelihood in nats, summed over ``tokens`` predicted tokens."""

    nll: float
    tokens: int

    @property
    def ppl(self) -> float:
        """exp of the mean negative log likelihood per token."""
        return math.exp(self.nll / self.tokens)


def window_perplexity(model: Any, tokens: Tensor, length: int = 2048, *, track: Track = silent) -> Perplexity:
    """Perplexity over non-overlapping windows of ``tokens`` (T,): the protocol of SparseGPT (Frantar & Alistarh 2023, section 4)
    and Wanda for WikiText-2, whose test text is joined with two newlines. What is left behind the last whole window is not used.

    Raises:
        InputError: fewer than ``length`` tokens.
    """
    count = tokens.numel() // length
    if count == 0:
        raise InputError(f"perplexity over windows of {length} tokens needs at least as many, got {tokens.numel()}")
    return document_perplexity(model, list(tokens[: count * length].view(count, length)), length, track=track)


def document_perplexity(model: Any, documents: Sequence[Tensor], length: int, *, track: Track = silent) -> Perplexity:
    """Perplexity over ``documents``, each (T,) token ids cut to its first ``length``; every predicted token weighs the same.

    Raises:
        InputError: no document has two tokens.
    """
    nll, count = 0.0, 0
    for ids in track(_usable(documents, length), "perplexity", len(documents)):
        batch = ids.to(model.device).unsqueeze(0)
        with torch.inference_mode():
            logits = model(input_ids=batch, use_cache=False).logits[0, :-1]
        for part, labels in zip(torch.split(logits, _LOSS_ROWS), torch.split(batch[0, 1:], _LOSS_ROWS), strict=True):
            nll += float(F.cross_entropy(part.float(), labels, reduction="sum"))
        count += ids.numel() - 1
    if count == 0:
        raise InputError("perplexity needs a document of at least two tokens")
    return Perplexity(nll, count)


def _usable(documents: Iterable[Tensor], length: int) -> Iterable[Tensor]:
    return (ids[:length] for ids in documents if ids.numel() > 1)
