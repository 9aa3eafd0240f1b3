"""Activations as 8-bit levels, a scale for each token: what products of quantised weights multiply on a GPU (:mod:`.backends.cuda_levels`).

level = x · (L / largest) rounded to the nearest, scale = largest / L, with ``largest`` the row's largest magnitude and L the largest level
of the type; all in float32. The arithmetic here is that of the kernels, bit for bit.

What a product leaves behind a ReLU has no such scale before all blocks of its kernel have ended: too late for its epilogue. But no sum can
be larger than its weights' norm times its token's (Cauchy and Schwarz), and e4m3, which is of floating point, loses next to nothing by a
scale that is several times too large: levels below the largest one have as many bits. So a LayerNorm leaves that bound, too, as the scale
of what the product behind it will leave (:func:`relu_bound`). int8 levels would lose those bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["LARGEST", "SCALES_PADDING", "TokenLevels", "levels_of_rows", "new_levels", "relu_bound"]

LARGEST: Mapping[torch.dtype, float] = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest level of each type that activations may become."""
SCALES_PADDING = 768
"""Scales are allocated in multiples of so many, as tiles of 32 to 256 activation rows, or of 192, read them whole."""
_LEAST_SCALE = 1e-20
"""Of those that are bounds: each has an inverse."""
_ROUNDING = 1.07
"""The norm of a row's e4m3 levels over the row's own, at most: a sixteenth for each level, little for those near zero, and for sums."""


@dataclass(frozen=True, slots=True)
class TokenLevels:
    """Rows of activations of type ``dtype``: ``values`` (m, columns) of levels and ``scales`` float32, of which the first m are theirs.

    ``ahead`` (2, …), or None: like ``scales``, those of what a certain product leaves behind a ReLU (:func:`relu_bound`), and their
    inverses.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype
    ahead: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)


def new_levels(m: int, columns: int, element: torch.dtype, dtype: torch.dtype, device: torch.device) -> TokenLevels:
    """Room for the levels of m rows; a row begins at a multiple of 16 bytes."""
    values = torch.empty(m, -(-columns // 16) * 16, dtype=element, device=device)
    return TokenLevels(values[:, :columns], torch.empty(-(-m // SCALES_PADDING) * SCALES_PADDING, device=device), dtype)


def relu_bound(norm: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 (2,): times a token's norm, plus the second, is a scale for the e4m3 levels of ReLU(x Wᵀ + b), none of which it clips.

    ``norm`` (1,) is the largest norm of a row of W, ``bias`` (out,); x are levels of the tokens.
    """
    most = norm.new_zeros(1) if bias is None else bias.float().max().clamp_min(0).reshape(1)
    return torch.cat([norm * _ROUNDING, most]) / LARGEST[torch.float8_e4m3fn]


def levels_of_rows(x: Tensor, element: torch.dtype, bound: Tensor | None = None) -> TokenLevels:
    """Levels of type ``element`` of x (m, columns), by torch; ``ahead`` are what a :func:`relu_bound` makes of the rows' norms."""
    (m, columns), largest = x.shape, LARGEST[element]
    made = new_levels(m, columns, element, x.dtype, x.device)
    found = x.float().abs().amax(1) if columns else torch.zeros(m, device=x.device)
    # Quotients of tensors: torch may multiply by the inverse of a number.
    most = torch.full_like(found, largest)
    exact = x.float() * torch.where(found > 0, most / found, 0.0)[:, None]
    made.values.copy_(exact.round() if element is torch.int8 else exact.clamp(-largest, largest))
    made.scales[:m] = found / most
    if bound is None:
        return made
    scales = (bound[0] * x.float().norm(dim=1) + bound[1]).clamp_min(_LEAST_SCALE)
    ahead = made.scales.new_empty(2, len(made.scales))
    ahead[:, :m] = torch.stack([scales, 1 / scales])
    return replace(made, ahead=ahead)
