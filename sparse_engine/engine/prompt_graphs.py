"""The pass of one prompt on an NVIDIA GPU as a CUDA graph: its launches take the host longer than the GPU works on a prompt of few tokens.

A graph serves prompts of up to its bucket's tokens. What stands behind a shorter prompt is other tokens, which attention, being causal,
hides from it; they leave keys and values behind the prompt's, where generation overwrites them before it reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_engine.engine.capture import captured
from sparse_engine.engine.prefill import PromptBatch

__all__ = ["PromptGraphs", "bucket_of"]

_MOST_TOKENS = 4096
"""A prompt of more keeps a GPU busy for longer than its launches take."""


def bucket_of(tokens: int) -> int | None:
    """Tokens of the graph that serves a prompt of ``tokens``, one of 42 numbers, or None where none does."""
    if tokens > _MOST_TOKENS:
        return None
    step = 64 if tokens <= 1024 else 128
    return next((few for few in (16, 32) if tokens <= few), -(-tokens // step) * step)


class PromptGraphs:
    """Passes of single prompts into one cache, a graph for each bucket.

    Args:
        run: the pass: what prompts it is given to logits (1, V), which leaves keys and values in the cache.
        pool: of graphs that never run at the same time as these.
    """

    def __init__(self, run: Callable[[PromptBatch], Tensor], device: torch.device, pool: Any) -> None:
        self._run, self._device, self._pool = run, device, pool
        self._made: dict[int, tuple[torch.cuda.CUDAGraph, PromptBatch, Tensor]] = {}

    def __call__(self, row: int, prompt: Tensor, bucket: int) -> Tensor:
        """Logits (1, V) behind ``prompt``, int64 (P,), whose keys and values go to ``row`` of the cache.

        The cache and the model's positions have room for the ``bucket``.
        """
        given = self._made[bucket][1] if bucket in self._made else self._places(bucket)
        given.tokens[: len(prompt)] = prompt
        given.row.fill_(row)
        given.lasts.fill_(len(prompt) - 1)
        if bucket not in self._made:
            self._capture(given, bucket)
        graph, _, logits = self._made[bucket]
        graph.replay()
        # The next graph may take their memory.
        return logits.clone()

    @torch.inference_mode(mode=False)  # graphs serve calls that may run in another mode
    def _places(self, tokens: int) -> PromptBatch:
        zeros = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        return PromptBatch(zeros, zeros.clone(), torch.arange(tokens, device=self._device), zeros[:1].clone(), [tokens])

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _capture(self, given: PromptBatch, bucket: int) -> None:
        graph, logits = captured(partial(self._run, given), partial(self._run, given), self._device, self._pool)
        self._made[bucket] = graph, given, logits
