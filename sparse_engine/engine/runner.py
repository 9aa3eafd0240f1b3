"""A model's decoder over a batch of rows with a static key-value cache: prompts in, then a token per row and step.

:class:`Runner` is the form that runs everywhere, operator by operator; the files beside it make its step faster on one kind of
device. ``runner_for`` gives the runner of a model, made once and anew when the model's weights were moved or changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sparse_engine.engine.choice import Choice
from sparse_engine.engine.kernels import DecodeState, Embedding, attention_decode, embed, layer_norm
from sparse_engine.engine.kernels.embed import POSITION_OFFSET
from sparse_engine.engine.prefill import prefill
from sparse_engine.engine.product import Product, feed_forward
from sparse_engine.engine.weights import DecoderWeights, LayerNormWeights, fingerprint, plans, why_not
from sparse_engine.errors import InputError

__all__ = ["MAX_BATCH", "Cache", "Runner", "Session", "runner_for"]

MAX_BATCH = 256
"""Rows of one session."""

_CAPACITY_STEP = 128
"""Cache capacities are multiples of this, so that requests of like length share buffers."""


@dataclass(eq=False)
class Cache:
    """Keys and values (layers, B, heads, S, D) of a batch, and the rows' state."""

    k: Tensor
    v: Tensor
    state: DecodeState

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[3]


class Runner:
    """Runs one model; ``why_not`` has no objection to it.

    Args:
        model: an OPT of transformers or of this package, in evaluation mode.
    """

    name = "eager"

    def __init__(self, model: Any) -> None:
        self.weights = DecoderWeights.of(model)
        self.device, self.dtype = self.weights.tokens.device, self.weights.tokens.dtype
        self.max_positions = min(self.weights.max_positions, int(model.config.max_position_embeddings))
        # Held, so that no later plan of a layer can have the identity of one of these.
        self._plans = plans(model)
        self.fingerprint = fingerprint(model)

    def path(self, batch: int) -> str:
        """What runs the steps of ``batch`` rows."""
        return self.name

    def batch_bucket(self, batch: int) -> int:
        """Rows that are allocated for ``batch`` of them."""
        return batch

    def allocate(self, batch: int, capacity: int, eos: int) -> Cache:
        """A cache of ``batch`` rows of ``capacity`` positions whose state has room for ``eos`` EOS tokens; every row is finished."""
        w = self.weights
        shape = (len(w.layers), batch, w.heads, capacity, w.head_size)
        options: dict[str, Any] = {"device": self.device}
        k = torch.zeros(shape, dtype=self.dtype, **options)
        state = DecodeState(
            tokens=torch.zeros(batch, dtype=torch.int64, **options),
            lengths=torch.zeros(batch, dtype=torch.int32, **options),
            history=torch.zeros(batch, capacity, dtype=torch.int64, **options),
            filled=torch.zeros(batch, dtype=torch.int32, **options),
            limits=torch.zeros(batch, dtype=torch.int32, **options),
            finished=torch.ones(batch, dtype=torch.bool, **options),
            eos=torch.zeros(eos, dtype=torch.int64, **options),
            pad=0,
        )
        return Cache(k, torch.zeros_like(k), state)

    @torch.inference_mode(mode=False)  # what one call allocates serves others, which may run in another mode
    @torch.no_grad()
    def session(self, batch: int, capacity: int, choice: Choice, *, eos: Sequence[int], pad: int) -> Session:
        """Rows for ``batch`` sequences of up to ``capacity`` tokens, prompts and their padding included.

        Raises:
            InputError: the batch is larger than MAX_BATCH, or the device has too little memory for the cache.
        """
        if batch > MAX_BATCH:
            raise InputError(f"{batch} sequences at once; the engine takes up to {MAX_BATCH}, give the rest to another call")
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        try:
            cache = self.allocate(self.batch_bucket(batch), capacity, len(eos))
        except torch.cuda.OutOfMemoryError:
            w = self.weights
            needed = 2 * len(w.layers) * self.batch_bucket(batch) * capacity * w.hidden * self.dtype.itemsize
            raise InputError(
                f"the key-value cache of {batch} sequences of {capacity} tokens takes {needed / 1e9:.1f} GB, which the GPU has not: "
                "use a smaller batch or fewer tokens"
            ) from None
        return Session(self, cache, choice, eos, pad)

    def prefill(self, cache: Cache, rows: Sequence[int], prompts: Sequence[Tensor]) -> Tensor:
        """Logits (len(rows), V) behind each of ``prompts``, whose keys and values go to ``rows`` of the cache."""
        return prefill(self.weights, cache.k, cache.v, rows, prompts)

    def logits(self, cache: Cache) -> Tensor:
        """Run the state's tokens, which are appended to the cache at the state's lengths: logits (B, V) behind them."""
        w, state, batch = self.weights, cache.state, cache.batch
        h = self._empty(batch, w.tokens.shape[1])
        inner = w.project_in is not None
        embed(state.tokens, state.lengths, Embedding(w.tokens, None if inner else w.positions, h))
        if w.project_in is not None:
            # A finished row may stand behind the last position.
            h = w.project_in(h) + w.positions[(state.lengths.long() + POSITION_OFFSET).clamp(max=len(w.positions) - 1)]
        scale = w.head_size**-0.5
        pending: Tensor | None = None
        for layer, keys, values in zip(w.layers, cache.k, cache.v, strict=True):
            if w.norm_first:
                h, qkv = self._of_norm(layer.qkv, layer.attention_norm, h, pending)
            else:
                qkv = layer.qkv(h)
            attended = self._empty(batch, w.hidden)
            attention_decode(qkv, keys, values, state.lengths, attended, scale)
            h, pending = layer.out.onto(h, attended)
            if w.norm_first and pending is None and layer.fc1.levels_at(batch) is not None:
                h, pending = feed_forward(layer.fc1, layer.fc2, layer.ffn_norm, h)
                continue
            norm = layer.ffn_norm if w.norm_first else layer.attention_norm
            total, x = self._norm(norm, h, pending)
            h, pending = layer.fc2.onto(total if w.norm_first else x, layer.fc1(x, relu=True))
            if not w.norm_first:
                _, h = self._norm(layer.ffn_norm, h, pending)
                pending = None
        if w.final_norm is not None:
            _, h = self._norm(w.final_norm, h, pending)
        elif pending is not None:
            h = h + pending
        if w.project_out is not None:
            h = w.project_out(h)
        return w.head(h)

    def step(self, cache: Cache, choice: Choice) -> None:
        """One token for every row that goes on, chosen on the device, without waiting for it."""
        choice.take(self.logits(cache), cache.state)

    def _of_norm(self, product: Product, norm: LayerNormWeights, h: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h + pending, the product of its LayerNorm)."""
        if pending is None and product.levels_at(len(h)) is not None:
            return h, product.of_norm(norm, h)
        h, x = self._norm(norm, h, pending)
        return h, product(x)

    def _norm(self, weights: LayerNormWeights, h: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """(h + pending, its LayerNorm)."""
        out = torch.empty_like(h)
        if pending is None:
            layer_norm(h, weights.weight, weights.bias, weights.eps, out)
            return h, out
        total = torch.empty_like(h)
        layer_norm(h, weights.weight, weights.bias, weights.eps, out, added=pending, total=total)
        return total, out

    def _empty(self, batch: int, width: int) -> Tensor:
        return torch.empty(batch, width, dtype=self.dtype, device=self.device)


class Session:
    """A batch under way. Rows are admitted with their prompts, step together, and may be replaced when they have finished."""

    def __init__(self, runner: Runner, cache: Cache, choice: Choice, eos: Sequence[int], pad: int) -> None:
        self.runner, self.cache, self.choice = runner, cache, choice
        state = cache.state
        state.eos.copy_(torch.tensor(list(eos), dtype=torch.int64))
        # The pad token is part of a captured step, so that it is set where the state is made.
        self.state = cache.state = DecodeState(**{f.name: getattr(state, f.name) for f in fields(state)} | {"pad": pad})
        state.finished.fill_(True)
        state.filled.zero_()
        state.lengths.zero_()
        state.history.fill_(pad)

    @torch.no_grad()
    def admit(self, rows: Sequence[int], prompts: Sequence[Tensor], limits: Sequence[int], *, padding: Sequence[int] | None = None) -> None:
        """Run ``prompts``, int64 (P_i,) on the device, in ``rows``, and choose the first new token of each.

        ``limits`` counts the tokens at which a row finishes, prompt included; ``padding`` the pad tokens in front of each prompt that
        are part of its history and of the limit (they never enter the model).

        Raises:
            InputError: a prompt is empty or has no room.
        """
        padding = padding or [0] * len(rows)
        for prompt, limit, pads in zip(prompts, limits, padding, strict=True):
            if not len(prompt):
                raise InputError("a prompt is empty; give it at least the beginning-of-sequence token")
            if len(prompt) > self.runner.max_positions or limit > self.cache.capacity or pads + len(prompt) >= limit:
                room = min(self.runner.max_positions, self.cache.capacity, limit - pads - 1)
                raise InputError(f"a prompt of {len(prompt)} tokens leaves no room for new ones: it may have {room}")
        logits = self.runner.prefill(self.cache, rows, prompts)
        state, device = self.state, self.runner.device
        index = torch.tensor(list(rows), device=device)
        for row, prompt, pads in zip(rows, prompts, padding, strict=True):
            state.history[row, :pads] = self.runner.weights.vocabulary if self.choice.skips_padding else state.pad
            state.history[row, pads : pads + len(prompt)] = prompt
        counts = torch.tensor([[len(p) - 1, pads + len(p), limit] for p, pads, limit in zip(prompts, padding, limits, strict=True)])
        counts = counts.to(device=device, dtype=torch.int32)
        names = ("lengths", "filled", "limits")
        some = {"tokens": state.tokens[index], "history": state.history[index], "finished": torch.zeros_like(state.finished[index])}
        some |= {name: counts[:, i].contiguous() for i, name in enumerate(names)}
        part = DecodeState(**some, eos=state.eos, pad=state.pad)
        self.choice.take(logits, part)
        for name in ("tokens", "history", "finished", *names):
            getattr(state, name)[index] = getattr(part, name)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row that has not finished; a finished row stays as it is."""
        self.runner.step(self.cache, self.choice)


_RUNNERS: weakref.WeakKeyDictionary[Any, Runner] = weakref.WeakKeyDictionary()


@torch.inference_mode(mode=False)
@torch.no_grad()
def runner_for(model: Any, *, forced: bool = False) -> Runner | str:
    """The runner of ``model``, or why it has none (a phrase that can follow "the model").

    ``forced``: where a device has no runner faster than transformers, the one that runs everywhere.
    """
    found = _RUNNERS.get(model)
    if found is not None and not model.training and found.fingerprint == fingerprint(model):
        return found
    if reason := why_not(model):
        return reason
    _RUNNERS.pop(model, None)
    device = next(model.parameters()).device.type
    kind: type[Runner] = Runner
    if device == "cuda":
        from sparse_engine.engine.cuda import CudaRunner

        kind = CudaRunner
    elif device == "cpu":
        from sparse_engine.engine.cpu import CpuRunner, objection

        reason = objection(model)
        if reason is not None and not forced:
            return reason
        kind = CpuRunner if reason is None else Runner
    elif not forced:
        return f"lies on {device}, where transformers' loop is as fast"
    _RUNNERS[model] = runner = kind(model)
    return runner
