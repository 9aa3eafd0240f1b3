"""PyTorch's own 2:4 path, cuSPARSELt: what ``torch.sparse.to_sparse_semi_structured`` gives a user, with its algorithm searched.

It is here to be compared with. Measured on an H200 (torch 2.11, bf16, weights read from HBM, CUDA graph, 768x768 to 16384x4096), its
default algorithm ran at 0.22 to 0.48 of the speed of the dense product up to 64 rows, and at 0.53 to 1.07 from 256 rows on. Torch
builds cuSPARSELt's plan anew at each call and offers no way to keep one; inside a CUDA graph that costs nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from sparse_engine import formats, tuning
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight, unpack_bits
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Config, Kernel, Layout, Problem, register

_NAME = "torch_semi_structured"
_TILE = 16
_ROWS = 8
"""Activation rows come in multiples of this, or the product is refused."""
_ALGORITHMS = 48
"""Algorithm numbers that tuning tries; the library refuses those it has not. Torch knows their number for old versions only."""
_DEFAULT = (0, 1, -1)
_TWO_FOUR = SparsityPattern.nm(2, 4)
# Fitted to that measurement: below 256 rows cuSPARSELt's default algorithm reads weights at a fraction of the bandwidth.
_MANY_ROWS = 256
# Outside a graph each call builds its plan anew on the host: 72 products of an OPT-125m's prompt took 36 ms more than dense ones.
_LAUNCH_US = 500.0
_BYTES_PER_US = {False: 0.6e6, True: 4.0e6}
_FLOPS_PER_US = 0.7e9


def _wrap(compressed: Tensor, rows: int, columns: int) -> Tensor:
    # With the transposition fused the product comes out row-major and needs no copy.
    shape = torch.Size((rows, columns))
    wrapped: Tensor = SparseSemiStructuredTensorCUSPARSELT(shape, compressed, None, None, None, None, fuse_transpose_cusparselt=True)
    return wrapped


def _product(x: Tensor, compressed: Tensor, rows: int, bias: Tensor | None, config: tuple[int, int, int]) -> Tensor:
    """``config`` is (algorithm, parts that the columns are split into, how the parts are summed), in cuSPARSELt's numbers."""
    columns = x.shape[-1]
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], rows))
    flat = x.reshape(-1, columns)
    m = flat.shape[0]
    if m % _ROWS:
        flat = F.pad(flat, (0, 0, 0, -m % _ROWS))
    elif not flat.is_contiguous() or flat.data_ptr() % 16:
        # The strides of activations are ignored down there: a strided view would give wrong sums without an error.
        flat = flat.clone(memory_format=torch.contiguous_format)
    algorithm, split_k, split_k_mode = config
    # With the transposition fused the product comes out row-major, and the rows of the padding lie behind the others: no copy.
    y = torch._cslt_sparse_mm(
        compressed, flat.t(), bias, transpose_result=True, alg_id=algorithm, split_k=split_k, split_k_mode=split_k_mode
    )
    return y[:m].view(*x.shape[:-1], rows)


def _checked(config: Config) -> tuple[int, int, int]:
    match config:
        case (int(algorithm), int(split_k), int(split_k_mode)):
            return algorithm, split_k, split_k_mode
    raise InputError(f"{_NAME} takes a configuration of three whole numbers, not {config}")


@cache
def _tuned(device: int, dtype: torch.dtype, shape: tuple[int, int], m: int) -> tuple[int, int, int]:
    found = tuning.lookup(torch.cuda.get_device_name(device), str(_TWO_FOUR), dtype, shape, m).get(_NAME)
    return _DEFAULT if found is None else _checked(found.config)


def _linear(x: Tensor, compressed: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    rows, columns = bitmask.shape[0], x.shape[-1]
    config = _tuned(x.device.index, x.dtype, (rows, columns), x.numel() // columns)
    return _product(x, compressed, rows, bias, config)


def _fake(x: Tensor, compressed: Tensor, bitmask: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


_op = define_linear(
    "torch_semi_structured_linear",
    _linear,
    ("CUDA",),
    arguments="Tensor x, Tensor compressed, Tensor bitmask, Tensor? bias",
    fake=_fake,
)


class TorchSemiStructuredKernel(Kernel):
    """Layout: ``compressed``, cuSPARSELt's undocumented blob, and ``bitmask`` uint8 (rows, ceil(columns/8)).

    The bitmask costs 1/16 of the dense bytes and makes :meth:`recover` exact: the blob does not say which zeros were kept
    where a group has fewer than two non-zeros.
    """

    name = _NAME
    formats: ClassVar[frozenset[str]] = frozenset({"nm"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    in_place = False
    # With torch 2.11 the host spends 0.1 to 0.2 s on every product of fp16, which it does not on one of bf16.
    types_alike = False

    def unsupported(self, problem: Problem) -> str | None:
        if problem.pattern != _TWO_FOUR:
            return f"multiplies 2:4 only, not {problem.pattern}"
        if problem.capability is None or problem.capability < (8, 0):
            return f"needs compute capability 8.0 for sparse tensor cores, not {_version(problem.capability)}"
        if problem.out_features % _TILE or problem.in_features % _TILE:
            return f"needs sizes that are multiples of {_TILE}, not {problem.out_features}x{problem.in_features}"
        if not torch.backends.cusparselt.is_available():
            return "needs cuSPARSELt, which this build of torch lacks"
        return None

    def cost(self, problem: Problem) -> float:
        flops = 2.0 * problem.rows * problem.out_features * problem.in_features
        return _LAUNCH_US + problem.packed_nbytes / _BYTES_PER_US[problem.rows >= _MANY_ROWS] + flops / _FLOPS_PER_US

    def configs(self, problem: Problem) -> Sequence[Config]:
        # Hopper splits the columns by itself where asked to (-1); before it, into a number of parts, summed by one kernel or two.
        hopper = problem.capability is not None and problem.capability >= (9, 0)
        splits = ((1, -1), (-1, -1)) if hopper else ((1, -1), (2, 1), (4, 1), (4, 2))
        return [(algorithm, *split) for split in splits for algorithm in range(_ALGORITHMS)]

    def suggest(self, x: Tensor, layout: Layout, bias: Tensor | None) -> Sequence[Config]:
        padded = F.pad(x, (0, 0, 0, -x.shape[0] % _ROWS)).contiguous()
        return [(int(torch._cslt_sparse_mm_search(layout["compressed"], padded.t(), bias, transpose_result=True)), 1, -1)]

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int | None:
        return problem.dense_nbytes * 9 // 16 + problem.out_features * -(-problem.in_features // 8)

    def prepare(self, packed: PackedWeight) -> Layout:
        dense = formats.get(packed.format).unpack(packed)
        compressed = torch._cslt_compress(dense)
        with warnings.catch_warnings():
            # The first tensor of this class announces that its interface is a prototype; here rather than in the hot path.
            warnings.simplefilter("ignore", UserWarning)
            _wrap(compressed, *packed.shape)
        return {"compressed": compressed, "bitmask": packed.tensors["bitmask"]}

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        rows, columns = packed.shape
        bitmask = layout["bitmask"]
        # A product with the identity: each sum has one term that is not zero, so it is exact.
        dense = _wrap(layout["compressed"], rows, columns).to_dense()
        # The product may give -0.0 where a packed weight holds 0.0.
        values = torch.where(dense == 0, torch.zeros_like(dense), dense)[unpack_bits(bitmask, columns)].view(rows, -1)
        return PackedWeight(
            packed.format, packed.version, packed.pattern, packed.shape, packed.dtype, {"values": values, "bitmask": bitmask}
        )

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        return _op(x, layout["compressed"], layout["bitmask"], bias)

    def run_config(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern, config: Config) -> Tensor:
        return _product(x, layout["compressed"], layout["bitmask"].shape[0], bias, _checked(config))


def _version(capability: tuple[int, int] | None) -> str:
    return "a device without one" if capability is None else f"{capability[0]}.{capability[1]}"


register(TorchSemiStructuredKernel())
