"""Token and position embedding of the tokens that enter a decode step, with the first LayerNorm (csrc/cuda/embed.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.layernorm import MAX_WIDTH, layer_norm, row_macros
from sparse_engine.errors import InputError

__all__ = ["POSITION_OFFSET", "Embedding", "EmbeddingParams", "Norm", "embed", "embed_reference"]

POSITION_OFFSET = 2
"""Row of OPT's position table that belongs to position 0."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A LayerNorm over what was just computed: weight, bias (H,), eps, and out (B, H)."""

    weight: Tensor
    bias: Tensor
    eps: float
    out: Tensor


@dataclass(frozen=True, slots=True)
class Embedding:
    """How a token becomes a row of ``out`` (B, E).

    ``tokens`` is the (V, E) table, ``positions`` the (P + 2, E) table of OPT, or None where positions are added later (OPT-350m).
    ``norm`` is the first layer's LayerNorm where it follows at once.
    """

    tokens: Tensor
    positions: Tensor | None
    out: Tensor
    norm: Norm | None = None

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    def check(self, batch: int) -> None:
        """Refuse tensors that the kernel could not read.

        Raises:
            InputError: shapes, types or devices do not fit.
        """
        table, width = self.tokens, self.width
        if table.dim() != 2 or table.dtype not in launching.ELEMENT or width % 8 or not 0 < width <= MAX_WIDTH:
            raise InputError(
                f"the token table is {table.dtype} {tuple(table.shape)}; (V, E) of float16, bfloat16 or float32 with E a multiple of 8 "
                f"up to {MAX_WIDTH} works"
            )
        expected = [("the token table", table, tuple(table.shape)), ("out", self.out, (batch, width))]
        if self.positions is not None:
            expected.append(("the position table", self.positions, (self.positions.shape[0], width)))
        if self.norm is not None:
            expected += [("norm.weight", self.norm.weight, (width,)), ("norm.bias", self.norm.bias, (width,))]
            expected.append(("norm.out", self.norm.out, (batch, width)))
        for name, tensor, shape in expected:
            launching.check(name, tensor, shape, table.dtype, table.device)

    def params(self) -> EmbeddingParams:
        """The kernel's view of these tensors."""
        norm, positions = self.norm, self.positions
        return EmbeddingParams(
            self.tokens.data_ptr(),
            positions.data_ptr() if positions is not None else None,
            self.out.data_ptr(),
            norm.weight.data_ptr() if norm else None,
            norm.bias.data_ptr() if norm else None,
            norm.out.data_ptr() if norm else None,
            self.tokens.shape[0],
            positions.shape[0] if positions is not None else 0,
            self.width,
            norm.eps if norm else 0.0,
        )


class EmbeddingParams(ctypes.Structure):
    """``Embedding`` of csrc/cuda/embedding.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_table", "position_table", "out", "norm_weight", "norm_bias", "norm_out")),
        *((name, ctypes.c_int) for name in ("vocabulary", "position_rows", "width")),
        ("eps", ctypes.c_float),
    )


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/embed.cu."""

    _fields_ = (("tokens", ctypes.c_void_p), ("positions", ctypes.c_void_p), ("embedding", EmbeddingParams))


def embed_reference(tokens: Tensor, positions: Tensor, embedding: Embedding) -> None:
    """What the kernel computes, in torch operators."""
    rows = embedding.tokens[tokens]
    if embedding.positions is not None:
        last = embedding.positions.shape[0] - 1
        rows = rows + embedding.positions[(positions.long() + POSITION_OFFSET).clamp(max=last)]
    embedding.out.copy_(rows)
    if (norm := embedding.norm) is not None:
        layer_norm(embedding.out, norm.weight, norm.bias, norm.eps, norm.out)


def embed(tokens: Tensor, positions: Tensor, embedding: Embedding) -> None:
    """embedding.out[b] = token table[tokens[b]] + position table[positions[b] + 2], and its LayerNorm where one is asked for.

    ``tokens`` (B,) int64 lie in the vocabulary; ``positions`` (B,) int32. A position behind the table takes its last row: only rows
    that have finished may stand there.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    batch = tokens.numel()
    device = embedding.tokens.device
    launching.check("tokens", tokens, (batch,), torch.int64, device)
    launching.check("positions", positions, (batch,), torch.int32, device)
    embedding.check(batch)
    if not embedding.tokens.is_cuda:
        embed_reference(tokens, positions, embedding)
        return
    if not batch:
        return
    macros = row_macros(embedding.width, embedding.tokens.dtype)
    params = _Params(tokens.data_ptr(), positions.data_ptr(), embedding.params())
    launching.run("embed.cu", "embed", macros, (batch, 1), macros["THREADS"], params, device)
