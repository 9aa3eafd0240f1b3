"""Attention of one new token per row over its key-value cache (csrc/cuda/attention_decode.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.ahead import Ahead
from sparse_engine.errors import InputError

__all__ = ["MAX_HEAD_SIZE", "Split", "attention_decode", "attention_reference", "choose_split"]

MAX_HEAD_SIZE = 256
_MAX_CLUSTER = 8
"""Blocks of a cluster that every Hopper GPU can place."""


@dataclass(frozen=True, slots=True)
class Split:
    """How one launch divides a head's positions: over ``blocks`` of a cluster and the ``warps`` of each block.

    A group of lanes has ``unroll`` positions of K, and as many of V, in flight. ``resident`` warps fit a multiprocessor.
    """

    blocks: int
    warps: int
    unroll: int
    resident: int

    def macros(self, head_size: int, element: torch.dtype) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "ELEMENT": launching.ELEMENT[element],
            "HEAD_SIZE": head_size,
            "WARPS": self.warps,
            "UNROLL": self.unroll,
            "MIN_BLOCKS": max(1, self.resident // self.warps),
        }


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/attention_decode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "k_cache", "v_cache", "lengths", "out")),
        *((name, ctypes.c_int) for name in ("heads", "capacity")),
        ("scale", ctypes.c_float),
        ("ahead", Ahead),
    )


def per_lane(head_size: int, itemsize: int) -> int:
    """16-byte vectors of a position that a lane of csrc/cuda/attention_decode.cu holds."""
    vectors = head_size * itemsize // 16
    even = vectors // min(vectors & -vectors, 32)
    return even if even <= 5 else -(-vectors // 32)


def choose_split(batch: int, heads: int, head_size: int, itemsize: int, capacity: int, processors: int, clusters: bool) -> Split:
    """The split for ``batch`` rows of ``heads`` whose caches hold up to ``capacity`` positions, on a GPU of ``processors``.

    As many warps as are resident at once, but no block of a cluster without 64 positions of the capacity: what is not in flight
    does not use the memory's bandwidth.
    """
    held = per_lane(head_size, itemsize)
    resident = 24 if held <= 2 else 8
    room = processors * resident // (batch * heads)
    blocks, warps = 1, 4
    while clusters and blocks < _MAX_CLUSTER and 2 * blocks * warps <= room and 128 * blocks <= capacity:
        blocks *= 2
    while warps < (8 if clusters or held > 2 else 16) and 2 * blocks * warps <= room:
        warps *= 2
    return Split(blocks, warps, max(1, 4 // held), resident)


def attention_reference(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, out: Tensor, scale: float) -> None:
    """What the kernel computes, in torch operators, with sums in float32 (float64 for float64 tensors)."""
    batch, heads, capacity, size = k_cache.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.view(batch, 3, heads, size).unbind(1)
    for b, length in enumerate(lengths.tolist()):
        seen = min(length, capacity - 1) + 1
        if length < capacity:
            k_cache[b, :, length], v_cache[b, :, length] = k[b], v[b]
        scores = torch.einsum("hd,hsd->hs", q[b].to(wide), k_cache[b, :, :seen].to(wide)) * scale
        out[b] = torch.einsum("hs,hsd->hd", scores.softmax(-1), v_cache[b, :, :seen].to(wide)).flatten().to(out.dtype)


def attention_decode(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    out: Tensor,
    scale: float,
    *,
    split: Split | None = None,
    ahead: Ahead | None = None,
) -> None:
    """Append a token to the cache of each row, then attend from it over all the row has.

    ``qkv`` (B, 3 * heads * D) holds q, k and v, each (heads, D); ``k_cache`` and ``v_cache`` (B, heads, S, D); ``lengths`` (B,) int32
    the tokens that each cache holds already. k and v go to position lengths[b], and out (B, heads * D) becomes softmax(scale * q · Kᵀ) · V
    over positions 0 … lengths[b]. ``scale`` is 1 where q is scaled already. Caches are left-aligned: no position in use is padding.
    A row with lengths[b] = S, which only a finished row may have, reads its cache and appends nothing; its output has no meaning.
    ``split`` overrides the launch's division of the work; ``ahead`` is what the next launch reads.

    Raises:
        InputError: shapes, types or devices do not fit, or D is not a multiple of 8 up to 256.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    if k_cache.dim() != 4 or qkv.dtype not in launching.ELEMENT:
        raise InputError(
            f"attention of {qkv.dtype} over a cache {tuple(k_cache.shape)}; it takes float16, bfloat16 or float32 and (B, heads, S, D)"
        )
    batch, heads, capacity, size = k_cache.shape
    if size % 8 or not 0 < size <= MAX_HEAD_SIZE or not capacity:
        raise InputError(
            f"heads of {size} over {capacity} positions; attention takes head sizes that are multiples of 8 up to {MAX_HEAD_SIZE}"
        )
    launching.check("qkv", qkv, (batch, 3 * heads * size), qkv.dtype, qkv.device)
    launching.check("k_cache", k_cache, (batch, heads, capacity, size), qkv.dtype, qkv.device)
    launching.check("v_cache", v_cache, (batch, heads, capacity, size), qkv.dtype, qkv.device)
    launching.check("lengths", lengths, (batch,), torch.int32, qkv.device)
    launching.check("out", out, (batch, heads * size), qkv.dtype, qkv.device)
    if not qkv.is_cuda:
        attention_reference(qkv, k_cache, v_cache, lengths, out, scale)
        return
    if not batch:
        return
    here = launching.gpu(qkv.device.index)
    split = split or choose_split(batch, heads, size, qkv.element_size(), capacity, here.processors, here.hopper)
    params = _Params(*(t.data_ptr() for t in (qkv, k_cache, v_cache, lengths, out)), heads, capacity, scale, ahead or Ahead())
    launching.run(
        "attention_decode.cu",
        "attention_decode",
        split.macros(size, qkv.dtype),
        (batch * heads, split.blocks),
        32 * split.warps,
        params,
        qkv.device,
        cluster=split.blocks,
    )
