"""Sparsity patterns as users write them, and what a mask promises."""

from __future__ import annotations

import re

import pytest
import torch

from sparse_engine.errors import InputError
from sparse_engine.mask import Mask
from sparse_engine.pattern import GROUP_SIZES, SparsityPattern


@pytest.mark.parametrize("m", GROUP_SIZES)
def test_every_group_size_parses_with_every_n(m: int) -> None:
    for n in range(1, m):
        pattern = SparsityPattern.parse(f"{n}:{m}")
        assert pattern == SparsityPattern.nm(n, m)
        assert pattern.is_nm
        assert pattern.group == (n, m)
        assert pattern.density == n / m
        assert str(pattern) == f"{n}:{m}"


@pytest.mark.parametrize(("text", "sparsity"), [("0.5", 0.5), (".75", 0.75), (" 50% ", 0.5), ("12.5%", 0.125), ("0.999", 0.999)])
def test_unstructured_patterns_parse(text: str, sparsity: float) -> None:
    pattern = SparsityPattern.parse(text)
    assert pattern == SparsityPattern.unstructured(sparsity)
    assert not pattern.is_nm
    assert pattern.density == 1 - sparsity
    assert SparsityPattern.parse(str(pattern)) == pattern
    with pytest.raises(InputError, match="is unstructured and has no N:M groups"):
        _ = pattern.group


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:4", "N must be 1 to 3, got 5:4"),
        ("4:4", "N must be 1 to 3, got 4:4"),
        ("0:4", "N must be 1 to 3, got 0:4"),
        ("2:3", "M in 2, 4, 8, 16, 32, got 2:3"),
        ("2:64", "M in 2, 4, 8, 16, 32, got 2:64"),
        ("2:0", "M in 2, 4, 8, 16, 32, got 2:0"),
        ("0", "strictly between 0 and 1, got 0"),
        ("1.0", "strictly between 0 and 1, got 1.0"),
        ("100%", "strictly between 0 and 1, got 1.0"),
        ("2", "strictly between 0 and 1, got 2.0"),
        ("abc", "cannot read 'abc' as a sparsity pattern: give N:M such as 2:4"),
        ("", "cannot read '' as a sparsity pattern"),
        ("-0.5", "cannot read '-0.5'"),
        ("2:4:8", "cannot read '2:4:8'"),
        ("-2:4", "cannot read '-2:4'"),
        ("nan", "cannot read 'nan'"),
        ("inf", "cannot read 'inf'"),
        ("1e-3", "cannot read '1e-3'"),
        ("²:4", "cannot read '²:4'"),
        ("2 : 4", "cannot read '2 : 4'"),
    ],
)
def test_bad_patterns_say_what_would_work(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        SparsityPattern.parse(text)


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"m": 4}, {"n": 2, "m": 4, "sparsity": 0.5}, {"m": 4, "sparsity": 0.5}])
def test_a_pattern_is_exactly_one_kind(fields: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"either N:M or an unstructured|needs both N and M"):
        SparsityPattern(**fields)


def test_nan_is_no_sparsity() -> None:
    with pytest.raises(InputError, match="strictly between 0 and 1"):
        SparsityPattern.unstructured(float("nan"))


def test_shape_must_be_divisible() -> None:
    SparsityPattern.parse("4:8").check_shape((3, 16))
    SparsityPattern.parse("0.5").check_shape((3, 7))
    with pytest.raises(InputError, match="fc1 has 12 input columns, which 4:8 cannot divide"):
        SparsityPattern.parse("4:8").check_shape((3, 12), "fc1")


def test_mask_names_the_group_that_breaks_its_pattern() -> None:
    keep = torch.tensor([True, True, False, False]).repeat(3, 4)
    assert Mask(SparsityPattern.parse("2:4"), keep).nnz == 24
    keep[2, 10] = True
    with pytest.raises(InputError, match="mask keeps 3 weights in row 2, columns 8 to 11, where 2:4 keeps 2"):
        Mask(SparsityPattern.parse("2:4"), keep)
    assert Mask(SparsityPattern.parse("0.5"), keep).nnz == 25


@pytest.mark.parametrize("keep", [torch.ones(4, 4), torch.ones(4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)])
def test_mask_must_be_a_bool_matrix(keep: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"a mask is a 2-D bool tensor, got torch\.\w+ of shape"):
        Mask(SparsityPattern.parse("0.5"), keep)


def test_mask_must_fit_its_columns() -> None:
    with pytest.raises(InputError, match="mask has 6 input columns, which 2:4 cannot divide"):
        Mask(SparsityPattern.parse("2:4"), torch.ones(2, 6, dtype=torch.bool))


def test_a_strided_mask_is_checked_by_its_values() -> None:
    keep = torch.tensor([True, False]).repeat(8, 4).T.contiguous().T
    assert not keep.is_contiguous()
    assert Mask(SparsityPattern.parse("1:2"), keep).nnz == 32
    keep[5, 0] = False
    with pytest.raises(InputError, match="mask keeps 0 weights in row 5, columns 0 to 1"):
        Mask(SparsityPattern.parse("1:2"), keep)


def test_apply_gives_a_copy_with_positive_zeros() -> None:
    weight = torch.tensor([[-0.0, 1.0, -2.0, 3.0]])
    mask = Mask(SparsityPattern.parse("2:4"), torch.tensor([[True, False, True, False]]))
    applied = mask.apply(weight)
    assert applied.tolist() == [[0.0, 0.0, -2.0, 0.0]]
    assert not bool(torch.signbit(applied[applied == 0]).any())
    assert weight.tolist() == [[-0.0, 1.0, -2.0, 3.0]]
