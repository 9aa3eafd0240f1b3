"""A whole decode step of one row in one kernel (csrc/cuda/decode_model.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.kernels.sample import DecodeState, StateParams
from sparse_engine.errors import InputError

__all__ = ["Dimensions", "ModelTensors", "WholeStep"]

# As in the source.
_WARPS = 15
_SLOT_BYTES = 4608
_MOST_PARTS = 8
"""Parts of a head's attention: more would cost those who join them more than they save."""
_UNIT = 256

_PART_POSITIONS = 64
_SETS = 2


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Of a model: widths of the state and of the ReLU network, heads of ``head_size``, kept values ``n`` of ``m``."""

    hidden: int
    ffn: int
    head_size: int
    layers: int
    vocabulary: int
    group: int
    """4 of a 2:4 pattern, 8 of 4:8."""

    @property
    def heads(self) -> int:
        return self.hidden // self.head_size

    def parts(self, blocks: int) -> int:
        """Parts that a head's attention may have so that each finds a block."""
        return max(1, min(_MOST_PARTS, blocks // self.heads))

    def objection(self, blocks: int, shared_limit: int) -> str | None:
        """Why the kernel has no form for them on a GPU of so many ``blocks`` at once, as a phrase that can follow "it", or None."""
        if self.hidden % _UNIT or self.ffn % _UNIT:
            return f"has widths {self.hidden} and {self.ffn}, which are no multiples of {_UNIT}"
        if self.head_size not in (64, 128):
            return f"has heads of {self.head_size}, not 64 or 128"
        if self.heads > blocks or max(3 * self.hidden, self.ffn) // 16 > _WARPS * blocks:
            return "is too wide"
        return None if self.slots(blocks, shared_limit) >= _WARPS else "leaves no shared memory for its weights"

    def set_words(self, blocks: int) -> int:
        """Words that the phases of one step publish, and the blocks' candidates."""
        attended = self.heads * self.parts(blocks) * (self.head_size + 4)
        layer = 3 * self.hidden // 2 + attended + 2 * (self.hidden // 2) + self.ffn // 2
        return -(-(self.layers * layer + 2 * blocks) // 4) * 4

    def _sums_bytes(self, blocks: int) -> int:
        jobs = _WARPS
        for rows, columns in ((3 * self.hidden, self.hidden), (self.hidden, self.hidden), (self.ffn, self.hidden), (self.hidden, self.ffn)):
            jobs = max(jobs, -(-rows // 16 // blocks) * (columns // _UNIT))
        return 64 * jobs

    def rest_bytes(self, blocks: int) -> int:
        """Dynamic shared memory behind the ring: the layers' pointers, zeros, activations, sums."""
        return 8 * len(LayerTensors.__dataclass_fields__) * self.layers + 16 + 2 * max(self.hidden, self.ffn) + self._sums_bytes(blocks)

    def slots(self, blocks: int, shared_limit: int) -> int:
        """Slots of the ring that fit beside the rest and the static shared memory."""
        static = 4 * _WARPS * (self.head_size + 2) + 16 * _WARPS + 256
        return (shared_limit - self.rest_bytes(blocks) - static) // (_SLOT_BYTES + 16)


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """What the kernel reads of a model: tables (V, H) and (P + 2, H), layers, last LayerNorm, head (V, H), int8 with ``scales`` (V,)."""

    tokens: Tensor
    positions: Tensor
    layers: tuple[LayerTensors, ...]
    final_scale: Tensor
    final_shift: Tensor
    head: Tensor
    head_scales: Tensor | None
    eps: float


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/include/step/model.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "token_table", "position_table", "final_scale", "final_shift")),
        *((name, ctypes.c_void_p) for name in ("head", "head_scales", "k_cache", "v_cache", "logits", "exchange", "steps", "clocks")),
        ("state", StateParams),
        *((name, ctypes.c_int) for name in ("layer_count", "vocabulary", "position_rows", "capacity", "set_words", "greedy")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class WholeStep:
    """The step of one model on one device. Steps of a model must follow each other on one stream.

    Raises:
        InputError: the device or the dimensions do not suit the kernel.
    """

    def __init__(self, tensors: ModelTensors, dimensions: Dimensions) -> None:
        device = tensors.tokens.device
        self.tensors, self.dimensions, self.device = tensors, dimensions, device
        here = launching.gpu(device.index)
        self.blocks = here.processors
        if not here.hopper or (reason := dimensions.objection(self.blocks, here.shared_limit)):
            raise InputError(f"no whole step for this model: it {reason if here.hopper else 'needs compute capability 9.0'}")
        self._shared = dimensions.slots(self.blocks, here.shared_limit) * _SLOT_BYTES + dimensions.rest_bytes(self.blocks)
        self._set_words = dimensions.set_words(self.blocks)
        self._layers = torch.tensor([layer.pointers() for layer in tensors.layers], dtype=torch.int64, device=device)
        self._exchange = torch.full((_SETS, self._set_words), -1, dtype=torch.int32, device=device)
        self._steps = torch.zeros(1, dtype=torch.int32, device=device)
        self.logits = torch.empty(1, dimensions.vocabulary, dtype=tensors.tokens.dtype, device=device)
        self.macros = self.macros_for(
            dimensions, tensors.tokens.dtype, self.blocks, here.shared_limit, int8=tensors.head_scales is not None
        )

    @staticmethod
    def macros_for(dimensions: Dimensions, dtype: torch.dtype, blocks: int, shared_limit: int, *, int8: bool) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "PATTERN": 24 if dimensions.group == 4 else 48,
            "ELEM_BF16": int(dtype is torch.bfloat16),
            "HIDDEN": dimensions.hidden,
            "FFN": dimensions.ffn,
            "HEAD_SIZE": dimensions.head_size,
            "HEAD_INT8": int(int8),
            "SLOTS": dimensions.slots(blocks, shared_limit),
            "POSITIONS": 8 if dimensions.head_size == 128 or dimensions.hidden <= 1024 else 16,
            "MAX_PARTS": dimensions.parts(blocks),
            "PART_POSITIONS": _PART_POSITIONS,
        }

    def __call__(self, k_cache: Tensor, v_cache: Tensor, state: DecodeState, *, greedy: bool, clocks: Tensor | None = None) -> Tensor:
        """Run the state's token, appended to the caches (layers, 1, heads, S, D): logits (1, V), which the next call overwrites.

        With ``greedy``, the state also advances by the largest one. ``clocks`` int64 (blocks, 5 * layers + 2, 2) takes the
        multiprocessors' clocks at which each block had what a phase waits for and was done with it: five phases of each layer, the
        head, the kernel.

        Raises:
            InputError: shapes, types or devices do not fit.
            KernelUnavailableError: the kernel cannot be compiled or launched.
        """
        tensors, d = self.tensors, self.dimensions
        dtype = tensors.tokens.dtype
        state.check(1)
        capacity = k_cache.shape[3]
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            launching.check(name, cache, (d.layers, 1, d.heads, capacity, d.head_size), dtype, self.device)
        if clocks is not None:
            launching.check("clocks", clocks, (self.blocks, 5 * d.layers + 2, 2), torch.int64, self.device)
        params = _Params(
            self._layers.data_ptr(),
            tensors.tokens.data_ptr(),
            tensors.positions.data_ptr(),
            tensors.final_scale.data_ptr(),
            tensors.final_shift.data_ptr(),
            tensors.head.data_ptr(),
            tensors.head_scales.data_ptr() if tensors.head_scales is not None else None,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            self.logits.data_ptr(),
            self._exchange.data_ptr(),
            self._steps.data_ptr(),
            clocks.data_ptr() if clocks is not None else None,
            StateParams.of(state),
            d.layers,
            d.vocabulary,
            tensors.positions.shape[0],
            capacity,
            self._set_words,
            int(greedy),
            tensors.eps,
            d.head_size**-0.5,
        )
        launching.run(
            "decode_model.cu",
            "decode_model",
            self.macros,
            (self.blocks, 1),
            32 * (_WARPS + 1),
            params,
            self.device,
            shared_bytes=self._shared,
            cooperative=True,
        )
        return self.logits
