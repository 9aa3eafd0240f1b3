"""N:M packed form: the kept values row by row in column order, and a little-endian bitmask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_engine.formats import register
from sparse_engine.formats.base import Format, PackedWeight, TensorSpec, pack_bits
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern


class NMFormat(Format):
    """``values`` (rows, columns·N/M) in the weight's type and ``bitmask`` uint8 (rows, ceil(columns/8)).

    A group with fewer than N non-zero weights still fills N slots, so every row has the same stride.
    """

    name = "nm"

    def accepts(self, pattern: SparsityPattern) -> bool:
        return pattern.is_nm

    def specs(self, shape: tuple[int, int], pattern: SparsityPattern, dtype: torch.dtype, nnz: int | None = None) -> dict[str, TensorSpec]:
        rows, columns = shape
        n, m = pattern.group
        return {
            "values": TensorSpec((rows, columns // m * n), dtype),
            "bitmask": TensorSpec((rows, -(-columns // 8)), torch.uint8),
        }

    def _pack(self, weight: Tensor, mask: Mask) -> dict[str, Tensor]:
        return {"values": weight[mask.keep].view(weight.shape[0], -1), "bitmask": pack_bits(mask.keep)}

    def _check_bits(self, packed: PackedWeight, rows: slice, keep: Tensor) -> str | None:
        n, m = packed.pattern.group
        kept = keep.view(keep.shape[0], -1, m).sum(-1, dtype=torch.int32)
        if bool((kept != n).any()):
            return f"the bitmask does not keep exactly {n} of every {m} columns as {packed.pattern} asks"
        spare = packed.shape[1] % 8
        if spare and bool((packed.tensors["bitmask"][rows, -1] >> spare).any()):
            return "the bitmask has bits set behind its last column"
        return None


register(NMFormat())
