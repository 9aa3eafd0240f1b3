"""The prompt's pass through the decoder: prompts of any lengths one behind the other, without padding, into rows of the caches."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine.engine.kernels.append_prompts import append_prompts
from sparse_engine.engine.kernels.embed import POSITION_OFFSET
from sparse_engine.engine.product import feed_forward
from sparse_engine.engine.weights import DecoderLayer, DecoderWeights

__all__ = ["CHUNK_TOKENS", "PromptBatch", "chunks", "pass_through", "prefill"]

CHUNK_TOKENS = 16384
"""Prompt tokens that pass at a time, which bounds the memory of the activations; a longer prompt passes alone."""


def prefill(weights: DecoderWeights, k_cache: Tensor, v_cache: Tensor, rows: Sequence[int], prompts: Sequence[Tensor]) -> Tensor:
    """Run ``prompts``, int64 (P_i,) with P_i ≥ 1, and keep their keys and values in ``rows`` of the caches (layers, B, heads, S, D).

    Gives the logits (len(prompts), V) behind each prompt.
    """
    parts = chunks([len(prompt) for prompt in prompts], CHUNK_TOKENS)
    batches = (PromptBatch.of([rows[i] for i in part], [prompts[i] for i in part], k_cache.device) for part in parts)
    logits = [pass_through(weights, k_cache, v_cache, batch) for batch in batches]
    return torch.cat(logits) if len(logits) > 1 else logits[0]


def chunks(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of consecutive prompts that have at most ``most`` tokens together; a longer prompt is alone."""
    chunk: list[int] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if chunk and tokens + length > most:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(index)
        tokens += length
    yield chunk


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts one behind the other, T tokens together, as tensors of the device.

    Attributes:
        tokens: int64 (T,).
        row: int64 (T,), the row of the caches that each token's keys and values go to.
        place: int64 (T,), the position of each token in its prompt.
        lasts: int64 (prompts,), where each prompt's last token stands.
        lengths: tokens of each prompt.
    """

    tokens: Tensor
    row: Tensor
    place: Tensor
    lasts: Tensor
    lengths: Sequence[int]

    @classmethod
    def of(cls, rows: Sequence[int], prompts: Sequence[Tensor], device: torch.device) -> PromptBatch:
        lengths = [len(prompt) for prompt in prompts]
        ends = list(itertools.accumulate(lengths))
        row = torch.tensor(rows, device=device).repeat_interleave(torch.tensor(lengths, device=device), output_size=ends[-1])
        place = torch.cat([torch.arange(length, device=device) for length in lengths])
        return cls(torch.cat(list(prompts)), row, place, torch.tensor(ends, device=device) - 1, lengths)


def pass_through(weights: DecoderWeights, k_cache: Tensor, v_cache: Tensor, prompts: PromptBatch) -> Tensor:
    """Logits (prompts, V) behind each prompt, whose keys and values are left in the caches; without a wait of the host."""
    h = weights.tokens[prompts.tokens]
    if weights.project_in is not None:
        h = weights.project_in(h)
    h = h + weights.positions[prompts.place + POSITION_OFFSET]
    attend = _Attention(prompts.lengths, weights.heads, k_cache.device)
    for layer, keys, values in zip(weights.layers, k_cache, v_cache, strict=True):
        h = _layer(layer, h, weights.norm_first, attend, (keys, values, prompts.row, prompts.place))
    return head(weights, h[prompts.lasts])


def head(weights: DecoderWeights, h: Tensor) -> Tensor:
    """Logits (B, V) of the last layer's output (B, H)."""
    if weights.final_norm is not None:
        h = weights.final_norm(h)
    if weights.project_out is not None:
        h = weights.project_out(h)
    return weights.head(h)


def _layer(layer: DecoderLayer, h: Tensor, norm_first: bool, attend: _Attention, cache: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    keys, values, row, place = cache
    qkv = layer.qkv.of_norm(layer.attention_norm, h) if norm_first else layer.qkv(h)
    append_prompts(qkv, row, place, keys, values)
    q, k, v = qkv.view(len(qkv), 3, attend.heads, -1).unbind(1)
    h = _added(*layer.out.onto(h, attend(q, k, v)))
    if not norm_first:
        h = layer.attention_norm(h)
    if norm_first:
        return _added(*feed_forward(layer.fc1, layer.fc2, layer.ffn_norm, h))
    return layer.ffn_norm(_added(*layer.fc2.onto(h, layer.fc1(h, relu=True))))


def _added(h: Tensor, pending: Tensor | None) -> Tensor:
    return h if pending is None else h + pending


class _Attention:
    """Causal attention of prompts that lie one behind the other: q, k, v (T, heads, D) to (T, heads · D)."""

    def __init__(self, lengths: Sequence[int], heads: int, device: torch.device) -> None:
        self.lengths, self.heads, self.device = lengths, heads, device
        self.longest = max(lengths)

    @cached_property
    def bounds(self) -> Tensor:
        """Where prompts begin and end, int32 (prompts + 1,). Prompts of one length do without."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if len(set(self.lengths)) == 1:
            out = _causal([t.view(-1, self.longest, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)], scale)
            return out.transpose(1, 2).reshape(len(q), -1)
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and (flash := _varlen()) is not None:
            out = flash(q, k, v, self.bounds, self.bounds, self.longest, self.longest, window_size=(-1, 0), scale=scale)
            return out.reshape(len(q), -1)
        bounds = self.bounds.tolist()
        outs = [
            _causal([t[begin:end].transpose(0, 1)[None] for t in (q, k, v)], scale)[0].transpose(0, 1)
            for begin, end in itertools.pairwise(bounds)
        ]
        return torch.cat(outs).reshape(len(q), -1)


def _causal(qkv: Sequence[Tensor], scale: float) -> Tensor:
    return F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True, scale=scale)


@cache
def _varlen() -> Callable[..., Tensor] | None:
    """torch's attention over sequences of several lengths where this version has it in the form used here, or None."""
    try:
        varlen: Any = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    known = inspect.signature(varlen.varlen_attn).parameters.keys()
    return varlen.varlen_attn if {"window_size", "scale"} <= known else None
