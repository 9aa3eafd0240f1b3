"""Wanda: weights scored by magnitude times input norm, no update (Sun et al. 2024, "A Simple and Effective Pruning Approach")."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparse_engine.pattern import SparsityPattern
from sparse_engine.pruners import register
from sparse_engine.pruners.base import Needs, Pruner, keep_largest, removed_count, row_chunks

if TYPE_CHECKING:
    from sparse_engine.calibrate import Statistics


class Wanda(Pruner):
    """Score |w_ij|·‖x_j‖₂ (section 3, equation 1). Unstructured: the lowest of each output row. N:M: the lowest of each group."""

    name = "wanda"
    needs: ClassVar[Needs] = Needs.INPUT_NORMS

    def _prune(self, weight: Tensor, statistics: Statistics | None, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
        assert statistics is not None
        columns = weight.shape[1]
        n, m = pattern.group if pattern.sparsity is None else (columns - removed_count(pattern.sparsity, columns), columns)
        norms = statistics.norms.to(weight.device)
        keep = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        for rows in row_chunks(weight):
            keep[rows] = keep_largest(weight[rows].float().abs() * norms, n, m)
        return weight, keep


register(Wanda())
