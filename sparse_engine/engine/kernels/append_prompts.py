"""Keys and values of prompts into the caches (csrc/cuda/append_prompts.cu)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching

__all__ = ["append_prompts"]

_MOST_THREADS = 256


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/append_prompts.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "row", "place", "k", "v")),
        *((name, ctypes.c_int) for name in ("heads", "positions", "vectors")),
    )


def append_prompts(qkv: Tensor, row: Tensor, place: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """k_cache[row[t], :, place[t]] = qkv[t, 1] and v_cache[row[t], :, place[t]] = qkv[t, 2] for every token t.

    ``qkv`` (T, 3 · heads · D) is contiguous, as are the caches (B, heads, S, D) of its type; ``row`` and ``place`` (T,) are int64 and
    lie within the caches. No two tokens share a place.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    rows, heads, positions, size = k_cache.shape
    tokens, device = len(place), qkv.device
    launching.check("qkv", qkv, (tokens, 3 * heads * size), k_cache.dtype, k_cache.device)
    launching.check("the cache of values", v_cache, (rows, heads, positions, size), k_cache.dtype, device)
    launching.check("the cache of keys", k_cache, (rows, heads, positions, size), k_cache.dtype, device)
    for name, tensor in (("row", row), ("place", place)):
        launching.check(name, tensor, (tokens,), torch.int64, device)
    nbytes = size * qkv.element_size()
    if not qkv.is_cuda or nbytes % 16 or any(t.data_ptr() % 16 for t in (qkv, k_cache, v_cache)):
        _, k, v = qkv.view(tokens, 3, heads, size).unbind(1)
        k_cache[row, :, place], v_cache[row, :, place] = k, v
        return
    if not tokens:
        return
    vectors = nbytes // 16
    pointers = [t.data_ptr() for t in (qkv, row, place, k_cache, v_cache)]
    threads = min(_MOST_THREADS, -(-heads * vectors // 32) * 32)
    params = _Params(*pointers, heads, positions, vectors)
    launching.run("append_prompts.cu", "append_prompts", {}, (tokens, 1), threads, params, device)
