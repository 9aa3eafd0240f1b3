"""The engine on a processor: prompts pass in float32 through weights expanded a tile at a time, tokens through the native step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import native
from sparse_engine.engine import native_step
from sparse_engine.engine.choice import Choice
from sparse_engine.engine.kernels import advance
from sparse_engine.engine.kernels.embed import POSITION_OFFSET
from sparse_engine.engine.native_step import Decoder, Description
from sparse_engine.engine.prefill import chunks
from sparse_engine.engine.product import Int8Product, int8_head
from sparse_engine.engine.runner import Cache, Runner
from sparse_engine.linear import SparseLinear
from sparse_engine.registry import get

__all__ = ["CpuRunner", "int8_head", "objection"]

_TILE_BYTES = 8 << 20
"""Most bytes of a weight that are expanded at a time."""

_ROWS = 32
"""Rows of a bfloat16 product of prompts are filled up to multiples of this."""

_CHUNK_TOKENS = 4096
"""Prompt tokens that pass at a time, which bounds the memory of the activations; a longer prompt passes alone."""


def objection(model: Any) -> str | None:
    """Why the native step must not run ``model``, which lies on the CPU, as a phrase that can follow "it", or None when it may."""
    if reason := native_step.available():
        return f"lies on a processor without the native decode step: {reason}"
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if forced := {module.backend for module in layers} - {None, "cpu"}:
        return f"has layers that are to run on backend {min(map(str, forced))}"
    unread = {module.value_type for module in layers} - get("cpu").value_types
    return f"has {min(unread)} values, which the native step does not read" if unread else None


class CpuRunner(Runner):
    """The step's activations are float32; a prompt's are too, apart from the products' where the processor multiplies bfloat16."""

    name = "native cpu step"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        int8 = self.weights.head
        head = {"values": int8.values, "scales": int8.scales} if isinstance(int8, Int8Product) else None
        self._description = Description(model, head=head)
        self._prompt = _Prompt(model, head)
        self._decoder: Decoder | None = None

    def prefill(self, cache: Cache, rows: Sequence[int], prompts: Sequence[Tensor]) -> Tensor:
        parts = chunks([len(prompt) for prompt in prompts], _CHUNK_TOKENS)
        logits = [self._prompt(cache, [rows[i] for i in part], [prompts[i] for i in part]) for part in parts]
        return torch.cat(logits)

    def logits(self, cache: Cache) -> Tensor:
        decoder = self._decoder
        if decoder is None or not decoder.fits(cache.batch, cache.capacity):
            decoder = self._decoder = Decoder(self._description, cache.batch, cache.capacity)
        state = cache.state
        # A row that has finished at the end of the cache or of the model's positions goes on at its last place, unseen.
        lengths = state.lengths.clamp(max=min(cache.capacity, self._description.positions) - 1)
        return decoder.step(state.tokens, torch.zeros_like(state.tokens), lengths, cache.k, cache.v)

    def step(self, cache: Cache, choice: Choice) -> None:
        logits = self.logits(cache)
        if choice == Choice():
            # NumPy's argmax takes a tenth of torch's time over a vocabulary, 1 % of a small model's step.
            advance(cache.state, torch.from_numpy(logits.numpy().argmax(1)))
        else:
            choice.take(logits, cache.state)


class _Product:
    """y (T, out) = x (T, in) Wᵀ + b in x's type; a weight that is not dense and of that type is expanded some rows at a time."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.rows, self.columns, self.dtype = module.out_features, module.in_features, dtype
        self.packed = module.packed if isinstance(module, SparseLinear) else None
        self.weight = None if isinstance(module, SparseLinear) else module.weight.detach()
        self.bias = None if module.bias is None else module.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if self.dtype is torch.bfloat16 and len(x) % _ROWS:
            # torch keeps code for every number of rows that a bfloat16 product had, half a megabyte each.
            return self(F.pad(x, (0, 0, 0, -len(x) % _ROWS)))[: len(x)]
        x = x.to(self.dtype)
        if self.weight is not None and self.weight.dtype is self.dtype:
            return F.linear(x, self.weight, self.bias)
        step = max(1, min(self.rows, _TILE_BYTES // (self.dtype.itemsize * self.columns)))
        scratch = torch.empty(step, self.columns, dtype=self.dtype)
        parts = []
        for begin in range(0, self.rows, step):
            end = min(begin + step, self.rows)
            tile = self._expand(begin, end, scratch[: end - begin])
            parts.append(F.linear(x, tile, None if self.bias is None else self.bias[begin:end]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _expand(self, begin: int, end: int, tile: Tensor) -> Tensor:
        if self.packed is None:
            assert self.weight is not None
            return tile.copy_(self.weight[begin:end])
        tensors, pattern = self.packed.tensors, self.packed.pattern
        native.expand_tile(
            tensors["values"],
            tensors.get("scales"),
            tensors["bitmask"],
            tensors.get("row_offsets"),
            pattern.n or 0,
            pattern.m or 0,
            self.columns,
            begin,
            end,
            tile,
            torch.get_num_threads(),
        )
        return tile


class _Norm:
    def __init__(self, module: Any) -> None:
        self.weight, self.bias, self.eps = module.weight.detach().float(), module.bias.detach().float(), module.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class _Layer:
    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        attention = module.self_attn
        self.attention_norm, self.ffn_norm = _Norm(module.self_attn_layer_norm), _Norm(module.final_layer_norm)
        self.qkv = [_Product(part, dtype) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.out, self.fc1, self.fc2 = (_Product(part, dtype) for part in (attention.out_proj, module.fc1, module.fc2))


class _Prompt:
    """The pass of prompts, one behind the other without padding, that leaves their keys and values in a cache."""

    def __init__(self, model: Any, head: Mapping[str, Tensor] | None) -> None:
        decoder, config = model.model.decoder, model.config
        self.tokens, self.positions = decoder.embed_tokens.weight.detach(), decoder.embed_positions.weight.detach()
        # Only processors of that level multiply bfloat16, faster than float32.
        dtype = self.tokens.dtype if self.tokens.dtype is torch.bfloat16 and native.isa() == "avx512" else torch.float32
        projections = (decoder.project_in, decoder.project_out)
        self.project_in, self.project_out = (None if part is None else _Product(part, dtype) for part in projections)
        self.layers = [_Layer(layer, dtype) for layer in decoder.layers]
        self.final_norm = None if decoder.final_layer_norm is None else _Norm(decoder.final_layer_norm)
        self.head = head or {"values": model.lm_head.weight.detach()}
        self.heads, self.norm_first = int(config.num_attention_heads), bool(config.do_layer_norm_before)

    def __call__(self, cache: Cache, rows: Sequence[int], prompts: Sequence[Tensor]) -> Tensor:
        lengths = [len(prompt) for prompt in prompts]
        places = torch.cat([torch.arange(length) for length in lengths])
        h = self.tokens[torch.cat(list(prompts))].float()
        if self.project_in is not None:
            h = self.project_in(h).float()
        h = h + self.positions[places + POSITION_OFFSET].float()
        for layer, keys, values in zip(self.layers, cache.k, cache.v, strict=True):
            x = layer.attention_norm(h) if self.norm_first else h
            q, k, v = (product(x).view(len(x), self.heads, -1) for product in layer.qkv)
            h += layer.out(self._attend(q, k, v, lengths, rows, keys, values))
            if not self.norm_first:
                h = layer.attention_norm(h)
            x = layer.ffn_norm(h) if self.norm_first else h
            h += layer.fc2(layer.fc1(x).relu_())
            if not self.norm_first:
                h = layer.ffn_norm(h)
        h = h[torch.tensor(lengths).cumsum(0) - 1]
        if self.final_norm is not None:
            h = self.final_norm(h)
        if self.project_out is not None:
            h = self.project_out(h)
        return self._logits(h.float())

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], rows: Sequence[int], keys: Tensor, values: Tensor) -> Tensor:
        """Causal attention of each prompt for itself, (T, hidden); keys and values go to ``rows`` of the layer's cache (B, H, S, D)."""
        out = []
        for row, *one in zip(rows, *(torch.split(t, list(lengths)) for t in (q, k, v)), strict=True):
            query, key, value = (t.transpose(0, 1) for t in one)
            keys[row, :, : key.shape[1]] = key
            values[row, :, : value.shape[1]] = value
            attended = F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
            out.append(attended[0].transpose(0, 1).flatten(1))
        return torch.cat(out)

    def _logits(self, h: Tensor) -> Tensor:
        values = self.head["values"]
        logits = torch.empty(len(h), len(values))
        native.dense_linear(h.contiguous(), values, None, logits, torch.get_num_threads(), self.head.get("scales"))
        return logits
