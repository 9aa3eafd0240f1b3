"""How kernels become torch operators: one library, ``define`` for the schema, the fake form and the implementations.

``torch.library.Library.define`` and ``impl`` cost about 5 µs a call where the ``custom_op`` decorator costs three times that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "define_linear", "linear_fake"]

NAMESPACE = "sparse_engine"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]

PACKED_ARGUMENTS = "Tensor x, Tensor values, Tensor bitmask, Tensor? row_offsets, Tensor? bias, int n, int m"
"""Arguments of an operator that reads the packed tensors in place; n = m = 0 for an unstructured weight."""


def linear_fake(x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, bias: Tensor | None, n: int, m: int) -> Tensor:
    """Shape of x (..., columns) by a packed (rows, columns) weight, for tracing."""
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


def define_linear(
    name: str,
    impl: Callable[..., Tensor],
    keys: tuple[str, ...],
    *,
    arguments: str = PACKED_ARGUMENTS,
    fake: Callable[..., Tensor] = linear_fake,
    **options: Any,
) -> Callable[..., Tensor]:
    """Register ``sparse_engine::name`` (arguments → Tensor) with an implementation per dispatch key, and return its overload."""
    _LIBRARY.define(f"{name}({arguments}) -> Tensor", **options)  # type: ignore[no-untyped-call]
    for key in keys:
        _LIBRARY.impl(name, impl, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Tensor] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload
