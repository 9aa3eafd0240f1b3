"""Unstructured packed form: the kept values of all rows, where each row starts, and a little-endian bitmask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_engine.errors import InputError
from sparse_engine.formats import register
from sparse_engine.formats.base import Format, PackedWeight, TensorSpec, pack_bits
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern


class UnstructuredFormat(Format):
    """``values`` (nnz,) row-major in column order, ``row_offsets`` int64 (rows + 1,), ``bitmask`` uint8 (rows, ceil(columns/8))."""

    name = "unstructured"

    def accepts(self, pattern: SparsityPattern) -> bool:
        return not pattern.is_nm

    def specs(self, shape: tuple[int, int], pattern: SparsityPattern, dtype: torch.dtype, nnz: int | None = None) -> dict[str, TensorSpec]:
        if nnz is None or not 0 <= nnz <= shape[0] * shape[1]:
            raise InputError(
                f"an unstructured {shape[0]}x{shape[1]} weight needs its number of stored values (0 to {shape[0] * shape[1]}), got {nnz}"
            )
        return {
            "values": TensorSpec((nnz,), dtype),
            "row_offsets": TensorSpec((shape[0] + 1,), torch.int64),
            "bitmask": TensorSpec((shape[0], -(-shape[1] // 8)), torch.uint8),
        }

    def _pack(self, weight: Tensor, mask: Mask) -> dict[str, Tensor]:
        offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int64, device=weight.device)
        torch.cumsum(mask.keep.sum(1), 0, out=offsets[1:])
        return {"values": weight[mask.keep], "row_offsets": offsets, "bitmask": pack_bits(mask.keep)}

    def _check_bits(self, packed: PackedWeight, rows: slice, keep: Tensor) -> str | None:
        offsets = packed.tensors["row_offsets"]
        if int(offsets[0]) != 0 or not torch.equal(offsets.diff()[rows], keep.sum(1)):
            return "row_offsets do not match the bitmask's count of kept weights per row"
        if int(offsets[-1]) != packed.nnz:
            return f"values holds {packed.nnz} entries where row_offsets end at {int(offsets[-1])}"
        spare = packed.shape[1] % 8
        if spare and bool((packed.tensors["bitmask"][rows, -1] >> spare).any()):
            return "the bitmask has bits set behind its last column"
        return None


register(UnstructuredFormat())
