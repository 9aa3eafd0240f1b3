"""Every registered packed format: bit-exact round trips, the layout on disk, and refusal of what is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_engine import formats
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.formats.base import VALUE_DTYPES, Format, PackedWeight, pack_bits, unpack_bits
from sparse_engine.mask import Mask
from sparse_engine.pattern import GROUP_SIZES, SparsityPattern
from sparse_engine.pruners.base import keep_largest

PATTERNS = [SparsityPattern.parse(text) for text in ("2:4", "1:2", "3:16", "16:32", "0.5", "0.9")]
CASES = [(fmt, pattern) for fmt in formats.all_formats().values() for pattern in PATTERNS if fmt.accepts(pattern)]
NAMED = pytest.mark.parametrize(("fmt", "pattern"), CASES, ids=[f"{fmt.name}-{pattern}" for fmt, pattern in CASES])


def random_mask(pattern: SparsityPattern, rows: int, columns: int, generator: torch.Generator) -> Mask:
    scores = torch.rand(rows, columns, generator=generator)
    return Mask(pattern, keep_largest(scores, *pattern.group) if pattern.sparsity is None else scores > pattern.sparsity)


def sample(pattern: SparsityPattern, rows: int = 5, columns: int = 96, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Mask]:
    generator = torch.Generator().manual_seed(rows * columns)
    mask = random_mask(pattern, rows, columns, generator)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[1] = 0
    weight[2] = -0.0
    return weight, mask


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@st.composite
def patterns(draw: st.DrawFn) -> SparsityPattern:
    if draw(st.booleans()):
        return SparsityPattern.unstructured(draw(st.floats(0.01, 0.99)))
    m = draw(st.sampled_from(GROUP_SIZES))
    return SparsityPattern.nm(draw(st.integers(1, m - 1)), m)


@settings(max_examples=150, deadline=None)
@given(
    pattern=patterns(),
    dtype=st.sampled_from(VALUE_DTYPES),
    rows=st.integers(1, 9),
    units=st.integers(1, 7),
    zeros=st.sampled_from([0.0, 0.3, 1.0]),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip_is_exact(
    pattern: SparsityPattern, dtype: torch.dtype, rows: int, units: int, zeros: float, strided: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = units * (pattern.m or 3)
    mask = random_mask(pattern, rows, columns, generator)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < zeros] = 0.0
    weight[torch.rand(rows, columns, generator=generator) < zeros / 2] = -0.0
    if strided:
        weight = weight.T.contiguous().T
    packers = [fmt for fmt in formats.all_formats().values() if fmt.accepts(pattern)]
    assert packers
    for fmt in packers:
        packed = fmt.pack(weight, mask)
        fmt.check(packed)
        assert same_bits(fmt.unpack(packed), mask.apply(weight))
        assert torch.equal(fmt.keep(packed), mask.keep)
        assert packed.nnz == mask.nnz
        specs = fmt.specs(packed.shape, pattern, dtype, packed.nnz)
        assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == {n: (s.shape, s.dtype) for n, s in specs.items()}
        assert packed.nbytes == sum(t.nbytes for t in packed.tensors.values())
        assert all(t.is_contiguous() for t in packed.tensors.values())


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_bitmask_is_little_endian(rows: int, columns: int, seed: int) -> None:
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = pack_bits(keep)
    assert bits.shape == (rows, -(-columns // 8))
    for i in range(rows):
        assert int.from_bytes(bytes(bits[i].tolist()), "little") == sum(1 << j for j in range(columns) if keep[i, j])
    assert torch.equal(unpack_bits(bits, columns), keep)


def test_layout_on_disk() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0], [4.0, -0.0, 0.0, 5.0, 6.0, 7.0, 0.0, 0.0]])
    keep = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1, 0, 0]]).bool()
    bitmask = [[0b11000110], [0b00111001]]
    nm = formats.get("nm").pack(weight, Mask(SparsityPattern.parse("2:4"), keep))
    assert nm.tensors["values"].tolist() == [[1, 2, 0, 3], [4, 5, 6, 7]]
    assert nm.tensors["bitmask"].tolist() == bitmask
    keep[0, 6] = False
    unstructured = formats.get("unstructured").pack(weight, Mask(SparsityPattern.parse("0.5"), keep))
    assert unstructured.tensors["values"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert unstructured.tensors["row_offsets"].tolist() == [0, 3, 7]
    assert unstructured.tensors["bitmask"].tolist() == [[0b10000110], [0b00111001]]


@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_half_of_16_bit_weights_takes_nine_sixteenths(text: str) -> None:
    weight, mask = sample(SparsityPattern.parse(text), 64, 128, torch.bfloat16)
    packed = formats.get("nm").pack(weight, mask)
    assert packed.nbytes * 16 == packed.dense_nbytes * 9


@NAMED
def test_reference_product_is_the_masked_dense_one(fmt: Format, pattern: SparsityPattern) -> None:
    weight, mask = sample(pattern)
    x, bias = torch.randn(3, 2, 96), torch.randn(5)
    product = fmt.linear(x, fmt.pack(weight, mask), bias)
    exact = x.double() @ (weight.double() * mask.keep).T + bias.double()
    assert product.shape == (3, 2, 5)
    assert (product - exact).norm() / exact.norm() < 1e-6


@NAMED
def test_an_empty_unstructured_row_or_a_zero_group_survives(fmt: Format, pattern: SparsityPattern) -> None:
    weight, mask = sample(pattern)
    if pattern.sparsity is not None:
        mask.keep[[0, 4]] = False
    packed = fmt.pack(weight, mask)
    fmt.check(packed)
    assert same_bits(fmt.unpack(packed), mask.apply(weight))


@NAMED
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_kept_weights_are_refused_by_name(fmt: Format, pattern: SparsityPattern, bad: float) -> None:
    weight, mask = sample(pattern)
    i, j = (int(v) for v in torch.nonzero(mask.keep)[3])
    weight[i, j] = bad
    with pytest.raises(InputError, match=r"decoder\.fc1 holds NaN or infinite values"):
        fmt.pack(weight, mask, "decoder.fc1")
    weight[i, j] = 1.0
    i, j = (int(v) for v in torch.nonzero(~mask.keep)[3])
    weight[i, j] = bad
    assert torch.isfinite(fmt.unpack(fmt.pack(weight, mask, "decoder.fc1"))).all()


@NAMED
def test_pack_refuses_what_does_not_fit(fmt: Format, pattern: SparsityPattern) -> None:
    weight, mask = sample(pattern)
    with pytest.raises(InputError, match=r"fc1: weight is \(4, 96\) but its mask is \(5, 96\)"):
        fmt.pack(weight[:4], mask, "fc1")
    with pytest.raises(InputError, match=r"fc1: cannot pack torch\.float64; convert to one of bfloat16, float16, float32"):
        fmt.pack(weight.double(), mask, "fc1")
    foreign = SparsityPattern.parse("0.5" if pattern.is_nm else "1:2")
    if not fmt.accepts(foreign):
        with pytest.raises(InputError, match=f"fc1: format {fmt.name} does not pack {foreign}"):
            fmt.pack(*sample(foreign), "fc1")


def tampered(packed: PackedWeight, **changes: Tensor) -> PackedWeight:
    return replace(packed, tensors={**packed.tensors, **changes})


@NAMED
def test_check_names_a_missing_or_misshapen_tensor(fmt: Format, pattern: SparsityPattern) -> None:
    packed = fmt.pack(*sample(pattern))
    for key, tensor in packed.tensors.items():
        rest = {name: t for name, t in packed.tensors.items() if name != key}
        with pytest.raises(CheckpointError, match=f"tensor fc1.{key} is missing"):
            fmt.check(replace(packed, tensors=rest), "fc1")
        with pytest.raises(CheckpointError, match=f"fc1.{key} is torch.int16"):
            fmt.check(tampered(packed, **{key: tensor.to(torch.int16)}), "fc1")
        with pytest.raises(CheckpointError, match="fc1"):
            fmt.check(tampered(packed, **{key: tensor[:-1]}), "fc1")
        with pytest.raises(CheckpointError, match="fc1"):
            fmt.check(tampered(packed, **{key: torch.cat([tensor, tensor])}), "fc1")
        with pytest.raises(CheckpointError, match="fc1"):
            fmt.check(tampered(packed, **{key: tensor.unsqueeze(0)}), "fc1")


@NAMED
def test_check_refuses_more_values_than_the_weight_has(fmt: Format, pattern: SparsityPattern) -> None:
    packed = fmt.pack(*sample(pattern))
    with pytest.raises(CheckpointError, match="fc1"):
        fmt.check(tampered(packed, values=torch.zeros(5 * 96 + 1)), "fc1")


@NAMED
@settings(max_examples=25, deadline=None)
@given(row=st.integers(0, 4), column=st.integers(0, 95))
def test_check_finds_any_flipped_bit(fmt: Format, pattern: SparsityPattern, row: int, column: int) -> None:
    packed = fmt.pack(*sample(pattern))
    bitmask = packed.tensors["bitmask"].clone()
    bitmask[row, column // 8] ^= 1 << column % 8
    with pytest.raises(CheckpointError, match=r"fc1: .*(bitmask|row_offsets)"):
        fmt.check(tampered(packed, bitmask=bitmask), "fc1")


@pytest.mark.parametrize(("text", "columns"), [("2:4", 12), ("1:2", 14), ("0.5", 13)])
def test_check_refuses_bits_behind_the_last_column(text: str, columns: int) -> None:
    pattern = SparsityPattern.parse(text)
    fmt = formats.for_pattern(pattern)
    packed = fmt.pack(*sample(pattern, columns=columns))
    bitmask = packed.tensors["bitmask"].clone()
    bitmask[3, -1] |= 0x80
    with pytest.raises(CheckpointError, match="fc1: the bitmask has bits set behind its last column"):
        fmt.check(tampered(packed, bitmask=bitmask), "fc1")


def test_check_refuses_a_shape_that_the_pattern_cannot_divide() -> None:
    packed = formats.get("nm").pack(*sample(SparsityPattern.parse("2:4"), columns=12))
    with pytest.raises(CheckpointError, match="fc1 has 13 input columns, which 2:4 cannot divide"):
        formats.get("nm").check(replace(packed, shape=(5, 13)), "fc1")


@pytest.mark.parametrize(
    "change",
    [
        lambda offsets: offsets + 1,
        lambda offsets: -offsets,
        lambda offsets: offsets.flip(0),
        lambda offsets: torch.cat([offsets[:-1], offsets[-1:] + 1]),
        lambda offsets: torch.cat([offsets[:1], offsets[1:2] + 1, offsets[2:]]),
        lambda offsets: torch.full_like(offsets, torch.iinfo(torch.int64).max),
    ],
)
def test_check_refuses_row_offsets_that_disagree(change: Callable[[Tensor], Tensor]) -> None:
    fmt = formats.get("unstructured")
    packed = fmt.pack(*sample(SparsityPattern.parse("0.5")))
    with pytest.raises(CheckpointError, match="fc1: row_offsets do not match"):
        fmt.check(tampered(packed, row_offsets=change(packed.tensors["row_offsets"])), "fc1")


def test_check_refuses_values_that_end_elsewhere_than_row_offsets() -> None:
    fmt = formats.get("unstructured")
    packed = fmt.pack(*sample(SparsityPattern.parse("0.5")))
    with pytest.raises(CheckpointError, match=r"fc1: values holds .* entries where row_offsets end at"):
        fmt.check(tampered(packed, values=packed.tensors["values"][:-1]), "fc1")


@pytest.mark.parametrize("nnz", [None, -1, 13])
def test_unstructured_needs_a_possible_number_of_values(nnz: int | None) -> None:
    with pytest.raises(InputError, match=r"an unstructured 3x4 weight needs its number of stored values \(0 to 12\)"):
        formats.get("unstructured").specs((3, 4), SparsityPattern.parse("0.5"), torch.float32, nnz)


def test_registry_answers_by_name_and_pattern() -> None:
    with pytest.raises(InputError, match=r"unknown packed format 'csr'; known: .*nm.*unstructured"):
        formats.get("csr")
    for pattern in PATTERNS:
        assert formats.for_pattern(pattern).accepts(pattern)
