"""The layers of a decode step of one row, two kernels each (csrc/cuda/half_attention.cu, half_ffn.cu and half_end.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.errors import InputError

__all__ = ["CLUSTER", "HalfDimensions", "HalfLayers"]

CLUSTER = 8
"""Blocks that share a head, or 256 values of the ReLU network's middle."""
# As in the sources.
_WARPS = 12
_SLOT_BYTES = 4608
_UNIT = 256
_HEAD_SIZE = 64
_WIDEST = 2048


@dataclass(frozen=True, slots=True)
class HalfDimensions:
    """Of a model: widths of the state and of the ReLU network, heads of ``head_size``, columns of a group of the pattern."""

    hidden: int
    ffn: int
    head_size: int
    group: int
    """4 of a 2:4 pattern, 8 of 4:8."""

    @property
    def heads(self) -> int:
        return self.hidden // self.head_size

    @property
    def middles(self) -> int:
        """Clusters that share the ReLU network."""
        return self.ffn // _UNIT

    def objection(self) -> str | None:
        """Why the kernels have no form for them, as a phrase that can follow "it", or None."""
        if self.hidden % _UNIT or self.ffn % _UNIT:
            return f"has widths {self.hidden} and {self.ffn}, which are no multiples of {_UNIT}"
        if self.head_size != _HEAD_SIZE:
            return f"has heads of {self.head_size}, not {_HEAD_SIZE}"
        # A block's share of the sums that every cluster reads would grow with the square of the width.
        return f"is {self.hidden} wide, more than {_WIDEST}" if self.hidden > _WIDEST else None

    def _joined_bytes(self, parts: int) -> int:
        quads = self.hidden // 4 // CLUSTER
        return min(32 * _WARPS // quads, parts) * quads * 16

    def attention_bytes(self) -> int:
        """Shared memory of half_attention.cu."""
        partial = 4 * (self.head_size + 2)
        rows = max(2 * self.hidden, CLUSTER * partial) + max(2 * self.hidden, _WARPS * partial)
        jobs = 3 * self.head_size // 16 * (self.hidden // _UNIT)
        return _WARPS * _SLOT_BYTES + rows + max(self._joined_bytes(self.middles), 64 * jobs) + 8 * self.head_size + 16 * _WARPS

    def ffn_bytes(self) -> int:
        """Shared memory of half_ffn.cu."""
        sums = 16 // CLUSTER * (self.hidden // _UNIT) * 64
        return _WARPS * _SLOT_BYTES + 4 * self.hidden + max(self._joined_bytes(self.heads), sums) + 2 * _UNIT + 16 * _WARPS

    def end_bytes(self) -> int:
        """Shared memory of half_end.cu."""
        return 2 * self.hidden + self._joined_bytes(self.middles) + 8 * _WARPS

    def macros(self, dtype: torch.dtype, processors: int) -> dict[str, dict[str, int]]:
        """What each source is compiled with."""
        # Blocks of more than one kernel should fit: the next one's fetch their weights meanwhile.
        crowded = CLUSTER * max(self.heads, self.middles) > processors
        macros = {"PATTERN": 24 if self.group == 4 else 48, "ELEM_BF16": int(dtype is torch.bfloat16), "HIDDEN": self.hidden}
        macros |= {"CLUSTER": CLUSTER, "MIN_BLOCKS": 3 if crowded else 2}
        return {
            "half_attention": {**macros, "HEAD_SIZE": self.head_size, "PARTS": self.middles, "SHARED_BYTES": self.attention_bytes()},
            "half_ffn": {**macros, "PARTS": self.heads, "SHARED_BYTES": self.ffn_bytes()},
            "half_end": {**macros, "PARTS": self.middles, "SHARED_BYTES": self.end_bytes()},
        }


class _Input(ctypes.Structure):
    """``Input`` of csrc/cuda/include/half/input.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("parts", "bias", "state", "total", "scale", "shift")),
        ("eps", ctypes.c_float),
    )


class _AttentionParams(ctypes.Structure):
    """``Params`` of csrc/cuda/half_attention.cu."""

    _fields_ = (
        ("in", _Input),
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "qkv_bias", "k_cache", "v_cache", "lengths", "sums")),
        ("capacity", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


class _FfnParams(ctypes.Structure):
    """``Params`` of csrc/cuda/half_ffn.cu."""

    _fields_ = (("in", _Input), *((name, ctypes.c_void_p) for name in ("first", "second", "bias", "sums")))


class _EndParams(ctypes.Structure):
    """``Params`` of csrc/cuda/half_end.cu."""

    _fields_ = (("in", _Input), ("out", ctypes.c_void_p))


class HalfLayers:
    """The layers of one model on one device, with the LayerNorm behind them. Steps of a model must follow each other on one stream.

    Args:
        final: scale and shift of the last LayerNorm.

    Raises:
        InputError: the device or the dimensions do not suit the kernels.
    """

    def __init__(self, layers: tuple[LayerTensors, ...], final: tuple[Tensor, Tensor], eps: float, dimensions: HalfDimensions) -> None:
        self.layers, self.final, self.eps, self.dimensions = layers, final, eps, dimensions
        self.dtype, self.device = final[0].dtype, final[0].device
        here = launching.gpu(self.device.index)
        if not here.hopper or (reason := dimensions.objection()):
            raise InputError(f"no half layers for this model: it {reason if here.hopper else 'needs compute capability 9.0'}")
        self.macros = dimensions.macros(self.dtype, here.processors)
        most = max(dimensions.heads, dimensions.middles)
        # Two buffers take turns: a kernel reads what the one before has left while it makes its own.
        self._sums = torch.empty(2, most, dimensions.hidden, dtype=torch.float32, device=self.device)
        self._states = torch.empty(2, dimensions.hidden, dtype=self.dtype, device=self.device)

    def __call__(self, h: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        """The last LayerNorm's output (1, H) for the embedding ``h`` (1, H) of the token behind ``lengths`` (1,) others.

        Its keys and values are appended to the caches (layers, 1, heads, S, D).

        Raises:
            InputError: shapes, types or devices do not fit.
            KernelUnavailableError: a kernel cannot be compiled or launched.
        """
        d, capacity = self.dimensions, k_cache.shape[3]
        launching.check("h", h, (1, d.hidden), self.dtype, self.device)
        launching.check("lengths", lengths, (1,), torch.int32, self.device)
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            launching.check(name, cache, (len(self.layers), 1, d.heads, capacity, d.head_size), self.dtype, self.device)
        sums, states = [t.data_ptr() for t in self._sums], [t.data_ptr() for t in self._states]
        state, parts, bias = h.data_ptr(), None, None
        for layer, k, v in zip(self.layers, k_cache, v_cache, strict=True):
            scale, shift = layer.attention_scale.data_ptr(), layer.attention_shift.data_ptr()
            entered = _Input(parts, bias, state, states[0], scale, shift, self.eps)
            tensors = (layer.qkv, layer.out, layer.qkv_bias, k, v, lengths)
            self._launch(
                "half_attention",
                d.heads,
                _AttentionParams(entered, *(t.data_ptr() for t in tensors), sums[0], capacity, d.head_size**-0.5),
            )
            scale, shift = layer.ffn_scale.data_ptr(), layer.ffn_shift.data_ptr()
            entered = _Input(sums[0], layer.out_bias.data_ptr(), states[0], states[1], scale, shift, self.eps)
            self._launch(
                "half_ffn", d.middles, _FfnParams(entered, *(t.data_ptr() for t in (layer.fc1, layer.fc2, layer.fc1_bias)), sums[1])
            )
            state, parts, bias = states[1], sums[1], layer.fc2_bias.data_ptr()
        out = torch.empty_like(h)
        entered = _Input(parts, bias, state, states[0], *(t.data_ptr() for t in self.final), self.eps)
        self._launch("half_end", 1, _EndParams(entered, out.data_ptr()))
        return out

    def _launch(self, name: str, clusters: int, params: ctypes.Structure) -> None:
        macros = self.macros[name]
        launching.run(
            f"{name}.cu",
            name,
            macros,
            (clusters, CLUSTER),
            32 * _WARPS,
            params,
            self.device,
            cluster=CLUSTER,
            shared_bytes=macros["SHARED_BYTES"],
        )
