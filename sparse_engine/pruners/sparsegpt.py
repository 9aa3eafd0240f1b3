"""SparseGPT: one-shot pruning with second-order weight updates.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot".
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparse_engine.calibrate import Hessian, full_fp32_matmul
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern
from sparse_engine.pruners import register
from sparse_engine.pruners.base import Needs, Pruner, keep_largest, keep_largest_overall, removed_count

if TYPE_CHECKING:
    from sparse_engine.calibrate import Statistics

BLOCK = 128
"""Columns pruned before their errors reach the columns behind them; every M divides it, so no group straddles two blocks."""

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean."""

_log = logging.getLogger("sparse_engine")


class SparseGPT(Pruner):
    """Columns are visited left to right; each removed weight's error is made good by the columns not yet visited (Algorithm 1).

    Unstructured: in each block of 128 columns the lowest scores over all rows go. N:M: a group's mask is chosen when its first
    column is reached, from weights that already carry the updates of the columns before it.
    """

    name = "sparsegpt"
    needs: ClassVar[Needs] = Needs.HESSIAN

    def _prune(self, weight: Tensor, statistics: Statistics | None, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
        if not isinstance(statistics, Hessian):
            raise InputError(f"pruner {self.name} needs the Hessian of calibration data, got {type(statistics).__name__}")
        hessian = statistics.matrix.to(weight.device)
        # One column of W is one contiguous row here, so that the per-column steps read and write straight lines.
        work = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        work[dead] = 0
        with full_fp32_matmul():
            upper = _inverse_factor(hessian, statistics.name)
            del hessian
            keep = _sweep(work, upper, pattern)
        return work.T, keep.T.contiguous()


def _sweep(work: Tensor, upper: Tensor, pattern: SparsityPattern) -> Tensor:
    """Prune ``work`` (columns, rows), in place, with U = ``upper`` (columns, columns); gives the keep mask (columns, rows)."""
    columns, rows = work.shape
    keep = torch.ones(work.shape, dtype=torch.bool, device=work.device)
    diagonal = upper.diagonal()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        if pattern.sparsity is not None:
            # Counted from the left edge, so that rounding does not add up over the blocks.
            removed = removed_count(pattern.sparsity, stop * rows) - removed_count(pattern.sparsity, start * rows)
            scores = (work[start:stop] / diagonal[start:stop, None]).square_()
            keep[start:stop] = keep_largest_overall(scores, (stop - start) * rows - removed)
        errors = torch.zeros(stop - start, rows, device=work.device)
        for j in range(start, stop):
            if pattern.sparsity is None and j % pattern.group[1] == 0:
                n, m = pattern.group
                scores = (work[j : j + m] / diagonal[j : j + m, None]).square_()
                keep[j : j + m] = keep_largest(scores.T, n, m).T
            error = torch.div(work[j], diagonal[j], out=errors[j - start]).masked_fill_(keep[j], 0)
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return keep


def _inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """U, upper triangular with UᵀU = (H + damping)⁻¹, fp32; ``hessian`` is overwritten.

    U is found as R⁻¹ with H = R Rᵀ and R upper triangular, which is the Cholesky factor of H with its rows and columns
    reversed: H⁻¹ is never formed, so there is no second factorisation that could fail.
    """
    mean = hessian.diagonal().mean()
    share, added = DAMPING, 0.0
    for _ in range(4):
        hessian.diagonal().add_(mean * (share - added))
        for dtype in (torch.float32, torch.float64):
            upper, failed = _factor(hessian.to(dtype))
            if not failed:
                if share != DAMPING or dtype is not torch.float32:
                    _log.warning("Hessian of %s is not positive definite in fp32: used damping %g in %s", name, share, dtype)
                return upper.float()
        share, added = share * 10, share
    _log.warning("Hessian of %s is not positive definite with damping up to %g: used its diagonal alone", name, added)
    return hessian.diagonal().abs().clamp_min(torch.finfo(torch.float32).tiny).rsqrt().diag()


def _factor(hessian: Tensor) -> tuple[Tensor, bool]:
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) != 0:
        return lower, True
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return upper, not bool(torch.isfinite(upper).all())


register(SparseGPT())
