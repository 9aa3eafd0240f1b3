"""Activations as 8-bit levels, a scale for each token: what products of quantised weights multiply on a GPU (:mod:`.backends.cuda_levels`).

level = x · (L / largest) rounded to the nearest, scale = largest / L, with ``largest`` the row's largest magnitude and L the largest level
of the type; all in float32. The arithmetic here is that of the kernels, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LARGEST", "SCALES_PADDING", "TokenLevels", "levels_of_rows", "new_levels"]

LARGEST: Mapping[torch.dtype, float] = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest level of each type that activations may become."""
SCALES_PADDING = 256
"""Scales are allocated in multiples of so many, as a tile of activation rows reads them."""


@dataclass(frozen=True, slots=True)
class TokenLevels:
    """Rows of activations of type ``dtype``: ``values`` (m, columns) of levels and ``scales`` float32, of which the first m are theirs."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)


def new_levels(m: int, columns: int, element: torch.dtype, dtype: torch.dtype, device: torch.device) -> TokenLevels:
    """Room for the levels of m rows; a row begins at a multiple of 16 bytes."""
    values = torch.empty(m, -(-columns // 16) * 16, dtype=element, device=device)
    return TokenLevels(values[:, :columns], torch.empty(-(-m // SCALES_PADDING) * SCALES_PADDING, device=device), dtype)


def levels_of_rows(x: Tensor, element: torch.dtype) -> TokenLevels:
    """Levels of type ``element`` of x (m, columns), by torch."""
    (m, columns), largest = x.shape, LARGEST[element]
    made = new_levels(m, columns, element, x.dtype, x.device)
    found = x.float().abs().amax(1) if columns else torch.zeros(m, device=x.device)
    # Quotients of tensors: torch may multiply by the inverse of a number.
    most = torch.full_like(found, largest)
    exact = x.float() * torch.where(found > 0, most / found, 0.0)[:, None]
    made.values.copy_(exact.round() if element is torch.int8 else exact.clamp(-largest, largest))
    made.scales[:m] = found / most
    return made
