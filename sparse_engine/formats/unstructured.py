"""Unstructured packed form: the kept values of all rows, where each row starts, and a little-endian bitmask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_engine.errors import InputError
from sparse_engine.formats import register
from sparse_engine.formats.base import Format, PackedWeight
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types.base import TensorSpec


class UnstructuredFormat(Format):
    """``values`` (nnz,) row-major in column order, ``row_offsets`` int64 (rows + 1,), ``bitmask`` uint8 (rows, ceil(columns/8)).

    ``row_offsets`` count values. Those of int4, two to an element, include the one that fills up a row of an odd number, so that row r
    starts at element row_offsets[r] / 2.
    """

    name = "unstructured"

    def accepts(self, pattern: SparsityPattern) -> bool:
        return not pattern.is_nm

    def _layout(
        self, shape: tuple[int, int], pattern: SparsityPattern, slots: int, nnz: int | None
    ) -> tuple[tuple[int, ...], dict[str, TensorSpec]]:
        most = shape[0] * -(-shape[1] // slots) * slots
        if nnz is None or not 0 <= nnz <= most or nnz % slots:
            raise InputError(f"an unstructured {shape[0]}x{shape[1]} weight needs its number of stored values (0 to {most}), got {nnz}")
        return (nnz // slots,), {"row_offsets": TensorSpec((shape[0] + 1,), torch.int64)}

    def _locate(self, counts: Tensor) -> dict[str, Tensor]:
        offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        return {"row_offsets": offsets}

    def _check_bits(self, packed: PackedWeight, rows: slice, keep: Tensor, counts: Tensor) -> str | None:
        offsets = packed.tensors["row_offsets"]
        if int(offsets[0]) != 0 or not torch.equal(offsets.diff()[rows], counts):
            return "row_offsets do not match the bitmask's count of kept weights per row"
        if int(offsets[-1]) != packed.nnz:
            return f"values holds {packed.nnz} entries where row_offsets end at {int(offsets[-1])}"
        spare = packed.shape[1] % 8
        if spare and bool((packed.tensors["bitmask"][rows, -1] >> spare).any()):
            return "the bitmask has bits set behind its last column"
        return None


register(UnstructuredFormat())
