"""Weights that share one layout, and the dense copies that products of many rows make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from products import expected_product, random_keep, relative_error

from sparse_engine import SparseLinear, formats, registry
from sparse_engine.backends import cuda_prefill
from sparse_engine.backends.cuda_prefill.expand import expanded
from sparse_engine.formats.base import PackedWeight, stack
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

KERNELS = [("2:4", "cuda_nm"), ("4:8", "cuda_nm"), ("0.5", "cuda_unstructured"), ("2:4", "dense"), ("0.5", "dense")]


def packed_weight(pattern: str, shape: tuple[int, int], seed: int, device: str = "cpu") -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    parsed = SparsityPattern.parse(pattern)
    keep = random_keep(shape, parsed, generator) if parsed.is_nm else torch.rand(shape, generator=generator) < 0.5
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    return formats.for_pattern(parsed).pack(weight, Mask(parsed, keep)).to(device)


@pytest.mark.parametrize("values", ["plain", "int8", "fp8", "int4"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "0.5"])
def test_stacked_weight_has_the_rows_of_its_parts(pattern: str, values: str) -> None:
    parsed = SparsityPattern.parse(pattern)
    fmt = formats.for_pattern(parsed)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 136, generator=generator) for rows in (5, 1, 16)]
    keeps = [
        random_keep((len(w), 136), parsed, generator) if parsed.is_nm else torch.rand(w.shape, generator=generator) < 0.5 for w in weights
    ]
    parts = [fmt.pack(weight, Mask(parsed, keep), value_type=values) for weight, keep in zip(weights, keeps, strict=True)]
    whole = stack(parts)
    fmt.check(whole, "stacked")
    assert torch.equal(fmt.unpack(whole), torch.cat([fmt.unpack(part) for part in parts]))


@pytest.mark.parametrize(("pattern", "name"), KERNELS)
def test_rows_of_a_layout_are_the_layout_of_the_rows(pattern: str, name: str) -> None:
    kernel = registry.get(name)
    parts = [packed_weight(pattern, (rows, 512), seed) for seed, rows in enumerate((48, 16, 40))]
    layout = kernel.prepare(stack(parts))
    begin = 0
    for part in parts:
        end = begin + part.shape[0]
        view = kernel.rows_of(layout, begin, end)
        assert view is not None
        again = kernel.recover(view, replace(part, tensors={}))
        assert again.tensors.keys() == part.tensors.keys()
        assert all(torch.equal(again.tensors[key], part.tensors[key]) for key in part.tensors)
        begin = end
    if name != "dense":
        assert kernel.rows_of(layout, 8, 48) is None, "a cut through a tile of 16 rows"


def test_stacked_layers_keep_working_and_moving() -> None:
    parts = [SparseLinear.from_packed(packed_weight("2:4", (16, 64), seed), backend="dense") for seed in range(3)]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    want = [part(x) for part in parts]
    whole = SparseLinear.stacked(parts)
    assert whole is not None
    # A library's product of another shape or alignment may add in another order.
    torch.testing.assert_close(whole(x), torch.cat(want, -1), rtol=1e-2, atol=1e-2)
    for part, y in zip(parts, want, strict=True):
        torch.testing.assert_close(part(x), y, rtol=1e-2, atol=1e-2)
    held = {t.untyped_storage().data_ptr() for layer in (whole, *parts) for _, _, layout in layer.plan() for t in layout.values()}
    assert len(held) == len(whole.plan()[0][2]), "one layout for all"
    unpacked = parts[1].unpack()
    assert torch.equal(parts[1].float().unpack(), unpacked.float())
    torch.testing.assert_close(parts[0](x), want[0], rtol=1e-2, atol=1e-2)
    assert SparseLinear.stacked([parts[0], parts[1]]) is None, "of two types"
    assert SparseLinear.stacked([SparseLinear.from_packed(packed_weight("2:4", (16, 64), 0), backend="reference")] * 2) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("pattern", "shape"), [("2:4", (33, 260)), ("2:4", (48, 1028)), ("4:8", (33, 264)), ("4:8", (1, 8)), ("4:8", (200, 768))]
)
def test_expanded_weight_is_the_masked_dense_one(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = packed_weight(pattern, shape, 0, "cuda")
    packed = replace(packed, dtype=dtype, tensors=packed.tensors | {"values": packed.tensors["values"].to(dtype)})
    layout = registry.get("cuda_nm").prepare(packed)
    torch.full((4 * shape[0] * shape[1],), float("nan"), device="cuda", dtype=dtype)
    got = expanded(pattern, layout["weight"], *shape, None)
    assert torch.equal(got, formats.get(packed.format).unpack(packed))


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "name"), KERNELS[:3])
@pytest.mark.parametrize("relu", [False, True])
def test_products_of_many_rows(pattern: str, name: str, relu: bool) -> None:
    packed = packed_weight(pattern, (80, 512), 1, "cuda")
    kernel = registry.get(name)
    layout = kernel.prepare(packed)
    for rows in (cuda_prefill.FEWEST_ROWS - 1, cuda_prefill.FEWEST_ROWS, 513):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        bias, residual = (torch.randn(n, device="cuda", dtype=torch.bfloat16) for n in ((80,), (rows, 80)))
        want = expected_product(x, packed, bias)
        want = (want.relu() if relu else want) + residual.double()
        got = kernel.run_fused(x, layout, bias, packed.pattern, relu=relu, residual=residual)
        assert relative_error(got, want) < 1e-2
