"""The pruners' algorithms once more, slowly and in fp64, straight from the papers: what the fast ones are checked against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_engine.pattern import SparsityPattern


def _keep_best(cells: list[tuple[float, int]], count: int) -> set[int]:
    """Positions of the ``count`` largest (score, position) cells; of equal scores the lower position wins."""
    return {position for _, position in sorted(cells, key=lambda cell: (-cell[0], cell[1]))[:count]}


def _keep_by_groups(scores: Tensor, n: int, m: int) -> Tensor:
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for start in range(0, len(row), m):
            for j in _keep_best([(row[j], j) for j in range(start, start + m)], n):
                keep[i, j] = True
    return keep


def magnitude(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """Keep mask by |w|: one threshold for the matrix, or per group."""
    scores = weight.double().abs()
    if pattern.sparsity is None:
        return _keep_by_groups(scores, *pattern.group)
    kept = scores.numel() - round(pattern.sparsity * scores.numel())
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    keep[list(_keep_best([(s, i) for i, s in enumerate(scores.flatten().tolist())], kept))] = True
    return keep.view(scores.shape)


def wanda(weight: Tensor, inputs: Tensor, pattern: SparsityPattern) -> Tensor:
    """Keep mask by |w_ij| · ‖x_j‖₂ (Sun et al. 2024, equation 1); ``inputs`` is (tokens, columns)."""
    scores = torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(weight.shape[1]):
        norm = math.sqrt(sum(value * value for value in inputs[:, j].double().tolist()))
        scores[:, j] = weight[:, j].double().abs() * norm
    columns = weight.shape[1]
    n, m = pattern.group if pattern.sparsity is None else (columns - round(pattern.sparsity * columns), columns)
    return _keep_by_groups(scores, n, m)


def sparsegpt(
    weight: Tensor, inputs: Tensor, pattern: SparsityPattern, *, block: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Pruned fp64 weight and keep mask by optimal brain surgeon steps with a shared elimination order.

    Frantar & Alistarh 2023, sections 3.2 to 3.4: when column j is reached, the inverse Hessian of the columns from j on is
    [H⁻¹] with columns 0..j-1 taken out by Gaussian elimination (equation 4); removing w_j costs w_j² / [H⁻¹]_jj and moves
    the later weights by -w_j / [H⁻¹]_jj · [H⁻¹]_j: (equation 3). No Cholesky factor, no lazy update.
    """
    weight = weight.double().clone()
    rows, columns = weight.shape
    hessian = 2 * inputs.double().T @ inputs.double() / inputs.shape[0]
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
            weight[:, j] = 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)

    remaining = [torch.linalg.inv(hessian)]
    for j in range(columns - 1):
        last = remaining[-1]
        remaining.append(last - torch.outer(last[:, j], last[j]) / last[j, j])

    keep = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if pattern.sparsity is None and j % pattern.group[1] == 0:
            n, m = pattern.group
            costs = torch.stack([weight[:, c] ** 2 / remaining[c][c, c] for c in range(j, j + m)], dim=1)
            keep[:, j : j + m] = _keep_by_groups(costs, n, m)
        if pattern.sparsity is not None and j % block == 0:
            stop = min(j + block, columns)
            removed = round(pattern.sparsity * rows * stop) - round(pattern.sparsity * rows * j)
            costs = torch.stack([weight[:, c] ** 2 / remaining[c][c, c] for c in range(j, stop)], dim=1)
            kept = _keep_best([(s, i) for i, s in enumerate(costs.flatten().tolist())], costs.numel() - removed)
            chosen = torch.zeros(costs.numel(), dtype=torch.bool)
            chosen[list(kept)] = True
            keep[:, j:stop] = chosen.view(costs.shape)
        inverse = remaining[j]
        for i in range(rows):
            if not keep[i, j]:
                weight[i, j:] -= weight[i, j] / inverse[j, j] * inverse[j, j:]
                weight[i, j] = 0
    return weight, keep
