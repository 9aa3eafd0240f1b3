"""The native decode step (``csrc/include/sparse_engine_decode.h``): a model described to the library once, then one call per token.

The library reads the model's own tensors; this module keeps them alive, and checks what a call is given so that the library may
trust it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_engine import native
from sparse_engine.engine.kernels.embed import POSITION_OFFSET
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.linear import SparseLinear

__all__ = ["Decoder", "Description", "available"]

_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = [
        ("type", _I32),
        ("values", _POINTER),
        ("values_count", _I64),
        ("bitmask", _POINTER),
        ("row_offsets", _POINTER),
        ("row_values", _I64),
        ("group", _I64),
        ("scales", _POINTER),
        ("rows", _I64),
        ("columns", _I64),
        ("bias", _POINTER),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("present", _I32), ("weight", _POINTER), ("bias", _POINTER)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", _Norm),
        *((name, _Linear) for name in ("q", "k", "v", "out")),
        ("ffn_norm", _Norm),
        *((name, _Linear) for name in ("fc1", "fc2")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _I64) for name in ("layers", "heads", "hidden", "embedding", "vocabulary", "positions", "position_offset")),
        ("epsilon", ctypes.c_float),
        *((name, _I32) for name in ("norm_first", "embedding_dtype", "cache_dtype")),
        ("token_embedding", _POINTER),
        ("position_embedding", _POINTER),
        ("project_in", _Linear),
        ("layer", ctypes.POINTER(_Layer)),
        ("final_norm", _Norm),
        ("project_out", _Linear),
        ("head", _Linear),
    ]


_CREATE = ("decoder_create", _I32, [ctypes.POINTER(_Model), _I64, _I64, _I32, ctypes.POINTER(_POINTER)])
_DESTROY = ("decoder_destroy", None, [_POINTER])
_STEP = ("decode_step", _I32, [_POINTER, _I64, *[_POINTER] * 5, _I64, _POINTER])


def available() -> str | None:
    """None when the step can be used, else why not."""
    try:
        for function in (_CREATE, _DESTROY, _STEP):
            native.function(*function)
    except KernelUnavailableError as error:
        return str(error)
    return None


class Description:
    """An OPT model as the library reads it: its tensors where they lie, kept alive by this, and small fp32 copies of norms and biases.

    Args:
        model: an ``OPTForCausalLM``, dense or packed, for which :func:`sparse_engine.engine.weights.why_not` has no objection. It is not
            kept: a cast or a move of it later is not seen.
        head: tensors ``values`` (V, E) and perhaps ``scales`` of an output head that takes the place of the model's own.

    Raises:
        InputError: a weight has a type that the library does not read.
    """

    def __init__(self, model: Any, *, head: Mapping[str, Tensor] | None = None) -> None:
        self._kept: list[Tensor] = []
        config, decoder = model.config, model.model.decoder
        tokens, positions = decoder.embed_tokens.weight.detach(), decoder.embed_positions.weight.detach()
        self.layers, self.heads, self.hidden = len(decoder.layers), int(config.num_attention_heads), int(config.hidden_size)
        self.vocabulary, self.positions, self.dtype = tokens.shape[0], positions.shape[0] - POSITION_OFFSET, tokens.dtype
        if self.dtype not in native.DTYPES:
            raise InputError(f"the native decode step reads no {str(self.dtype).removeprefix('torch.')} embeddings")
        layers = (_Layer * self.layers)()
        for target, layer in zip(layers, decoder.layers, strict=True):
            attention = layer.self_attn
            target.attention_norm, target.ffn_norm = self._norm(layer.self_attn_layer_norm), self._norm(layer.final_layer_norm)
            target.q, target.k, target.v = (self._linear(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
            target.out, target.fc1, target.fc2 = (self._linear(part) for part in (attention.out_proj, layer.fc1, layer.fc2))
        self.struct = _Model(
            self.layers,
            self.heads,
            self.hidden,
            tokens.shape[1],
            self.vocabulary,
            positions.shape[0],
            POSITION_OFFSET,
            decoder.layers[0].final_layer_norm.eps,
            bool(config.do_layer_norm_before),
            native.DTYPES[self.dtype],
            native.DTYPES[self.dtype],
            self._data(tokens),
            self._data(positions),
            self._linear(decoder.project_in),
            layers,
            self._norm(decoder.final_layer_norm),
            self._linear(decoder.project_out),
            self._linear(model.lm_head) if head is None else self._stored(head, (self.vocabulary, tokens.shape[1])),
        )

    def _data(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _norm(self, module: Any) -> _Norm:
        if module is None:
            return _Norm(0, None, None)
        return _Norm(1, *(self._data(None if part is None else part.detach().float()) for part in (module.weight, module.bias)))

    def _linear(self, module: Any) -> _Linear:
        if module is None:
            return _Linear()
        if isinstance(module, SparseLinear):
            packed = module.packed
            stored = self._stored(packed.tensors, packed.shape, packed.pattern.n or 0, packed.pattern.m or 0)
        else:
            stored = self._stored({"values": module.weight}, tuple(module.weight.shape))
        stored.bias = self._data(None if module.bias is None else module.bias.detach().float())
        return stored

    def _stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], n: int = 0, m: int = 0) -> _Linear:
        values = tensors["values"]
        if values.dtype not in native.DTYPES:
            raise InputError(f"the native decode step reads no {str(values.dtype).removeprefix('torch.')} values")
        parts = {name: self._data(tensors.get(name)) for name in ("values", "bitmask", "row_offsets", "scales")}
        rows, columns = shape
        row_values = columns if "bitmask" not in tensors else columns // m * n if m else 0
        return _Linear(
            native.DTYPES[values.dtype],
            parts["values"],
            values.numel(),
            parts["bitmask"],
            parts["row_offsets"],
            row_values,
            m,
            parts["scales"],
            rows,
            columns,
            None,
        )


class Decoder:
    """The decode step of a described model for caches (layers, batch, heads, slots, head_dim) of the model's type.

    Raises:
        KernelUnavailableError: there is no usable native library.
    """

    def __init__(self, description: Description, batch: int, slots: int) -> None:
        self.description, self.batch, self.slots = description, batch, slots
        create, self._destroy, self._step = (native.function(*function) for function in (_CREATE, _DESTROY, _STEP))
        made = _POINTER()
        self._threads = torch.get_num_threads()
        native.check(create(ctypes.byref(description.struct), batch, slots, self._threads, ctypes.byref(made)))
        self._decoder = made
        self._lock = threading.Lock()

    def fits(self, batch: int, slots: int) -> bool:
        """Whether a step of this size can be done, with as many threads as torch has now."""
        return batch <= self.batch and slots <= self.slots and self._threads == torch.get_num_threads()

    def step(self, tokens: Tensor, starts: Tensor, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Logits float32 (batch, vocabulary) behind ``tokens``, whose keys and values are written to slots ``lengths`` of the cache.

        Args:
            tokens: ids, int64 (batch,) on the CPU, like the others.
            starts: first slot of each sequence, behind its padding; int64 (batch,).
            lengths: int64 (batch,); slots starts .. lengths - 1 hold the sequence so far.
            keys, values: the cache, (layers, batch, heads, slots, head_dim) of the model's type.

        Raises:
            InputError: the cache is full, a sequence is longer than the model's positions, a token is none of its vocabulary, or the
                cache has another shape or type.
        """
        described, batch, slots = self.description, tokens.shape[0], keys.shape[3]
        shape = (described.layers, batch, described.heads, slots, described.hidden // described.heads)
        for name, cache in (("keys", keys), ("values", values)):
            if tuple(cache.shape) != shape or cache.dtype != described.dtype or not cache.is_contiguous():
                raise InputError(f"{name} are {cache.dtype} {tuple(cache.shape)}, expected contiguous {described.dtype} {shape}")
        if batch > self.batch or slots > self.slots:
            raise InputError(f"the decoder was made for {self.batch} sequences in {self.slots} slots, got {batch} in {slots}")
        logits = torch.empty(batch, described.vocabulary)
        given = [t.to(torch.int64).contiguous() for t in (tokens, starts, lengths)]
        arrays = [t.data_ptr() for t in (*given, keys, values)]
        # The library's scratch is one decoder's, and the interpreter lets other threads run during a call.
        with self._lock:
            status = self._step(self._decoder, batch, *arrays, slots, logits.data_ptr())
        if status:
            self._explain(slots, *given)
            native.check(status)
        return logits

    def _explain(self, slots: int, tokens: Tensor, starts: Tensor, lengths: Tensor) -> None:
        """Raise for what the library refuses, which it does before it writes anything."""
        described = self.description
        if int(lengths.max()) >= slots:
            raise InputError(f"the cache of {slots} tokens is full; make a larger one for longer texts")
        if bool((starts < 0).any()) or bool((lengths < starts).any()):
            raise InputError("a sequence ends before it starts: lengths are slots of the cache, its padding included")
        if (longest := int((lengths - starts).max())) >= described.positions:
            raise InputError(f"the model has {described.positions} positions, and a sequence would have {longest + 1} tokens")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < described.vocabulary:
            raise InputError(f"token ids are 0 to {described.vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}")

    def __del__(self) -> None:
        if (decoder := getattr(self, "_decoder", None)) is not None:
            self._destroy(decoder)
