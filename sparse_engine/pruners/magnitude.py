"""Magnitude pruning: the smallest weights go, whatever their inputs (Han et al. 2015, "Learning both Weights and Connections")."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from sparse_engine.pattern import SparsityPattern
from sparse_engine.pruners import register
from sparse_engine.pruners.base import Needs, Pruner, keep_largest, keep_largest_overall, removed_count

if TYPE_CHECKING:
    from sparse_engine.calibrate import Statistics


class Magnitude(Pruner):
    """Unstructured: one threshold for the whole matrix. N:M: the M - N smallest |w| of each group."""

    name = "magnitude"
    needs: ClassVar[Needs] = Needs.NOTHING

    def _prune(self, weight: Tensor, statistics: Statistics | None, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
        scores = weight.abs()
        if pattern.sparsity is not None:
            return weight, keep_largest_overall(scores, weight.numel() - removed_count(pattern.sparsity, weight.numel()))
        return weight, keep_largest(scores, *pattern.group)


register(Magnitude())
