"""Pruners against the papers' algorithms in fp64, and what every registered pruner must hold to."""

from __future__ import annotations

import logging

import pruner_references
import pytest
import torch
from torch import Tensor

from sparse_engine import pruners
from sparse_engine.calibrate import Hessian, InputNorms, Statistics, statistics_for
from sparse_engine.errors import InputError
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.pruners import sparsegpt
from sparse_engine.pruners.base import CHUNK_ELEMENTS, Needs, keep_largest, keep_largest_overall

PATTERNS = ["0.5", "0.3", "0.77", "1:2", "2:4", "1:4", "3:4", "4:8", "2:8", "3:16", "16:32"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """Activations like a transformer's: correlated columns, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    scale = torch.randn(columns, generator=generator).exp()
    return torch.randn(tokens, columns, generator=generator) @ mix * scale


def gaussian(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(x: Tensor, device: str = "cpu") -> Hessian:
    hessian = Hessian(x.shape[-1], device)
    hessian.update(x)
    return hessian


def expected_nnz(weight: Tensor, pattern: SparsityPattern) -> int:
    return round(weight.numel() * pattern.density)


# Every registered pruner


def test_known_pruners_are_discovered() -> None:
    assert {"magnitude", "wanda", "sparsegpt"} <= pruners.all_pruners().keys()
    assert all(name == pruner.name for name, pruner in pruners.all_pruners().items())


def test_unknown_pruner_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown pruner 'random'; known: .*magnitude"):
        pruners.get("random")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("name", sorted(pruners.all_pruners()))
def test_weight_and_mask_agree(name: str, text: str, dtype: torch.dtype, device: str) -> None:
    pattern, pruner = SparsityPattern.parse(text), pruners.get(name)
    weight = gaussian(17, 160, seed=1).to(device, dtype)
    weight[3] = 0
    weight[:, 32:64] = -0.0
    before = weight.clone()
    statistics = statistics_for(pruner.needs, 160, device)
    statistics.update(correlated(300, 160, seed=2).to(device, dtype))

    pruned, mask = pruner.prune(weight, statistics, pattern)

    assert torch.equal(weight, before)
    assert pruned.dtype is dtype
    assert mask.pattern == pattern
    assert abs(mask.nnz - expected_nnz(weight, pattern)) <= 17
    assert torch.equal(pruned, mask.apply(pruned))
    assert not bool((torch.signbit(pruned) & (pruned == 0)).any())
    assert torch.isfinite(pruned).all()
    again, same_mask = pruner.prune(weight, statistics, pattern)
    assert torch.equal(pruned, again)
    assert torch.equal(mask.keep, same_mask.keep)


@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (300, 32), (3, 416)])
@pytest.mark.parametrize("text", ["2:4", "16:32", "0.5"])
@pytest.mark.parametrize("name", sorted(pruners.all_pruners()))
def test_awkward_shapes_and_strided_weights(name: str, text: str, shape: tuple[int, int]) -> None:
    pruner = pruners.get(name)
    weight = gaussian(shape[1], shape[0], seed=3).T
    statistics = statistics_for(pruner.needs, shape[1])
    statistics.update(correlated(64, shape[1], seed=4))
    pruned, mask = pruner.prune(weight, statistics, SparsityPattern.parse(text))
    contiguous, _ = pruner.prune(weight.contiguous(), statistics, SparsityPattern.parse(text))
    assert mask.shape == shape
    assert torch.equal(pruned, contiguous)


@pytest.mark.parametrize("name", sorted(pruners.all_pruners()))
def test_bad_weights_are_refused(name: str) -> None:
    pruner, pattern = pruners.get(name), SparsityPattern.parse("2:4")
    statistics = statistics_for(pruner.needs, 8)
    statistics.update(gaussian(16, 8, seed=0))
    with pytest.raises(InputError, match=r"fc1: cannot prune torch\.int32 of shape \(4, 8\)"):
        pruner.prune(torch.ones(4, 8, dtype=torch.int32), statistics, pattern, layer="fc1")
    with pytest.raises(InputError, match="fc1 holds NaN or infinite"):
        pruner.prune(torch.full((4, 8), torch.nan), statistics, pattern, layer="fc1")
    with pytest.raises(InputError, match="fc1 has 6 input columns, which 2:4 cannot divide"):
        pruner.prune(torch.ones(4, 6), statistics, pattern, layer="fc1")
    if pruner.needs is Needs.NOTHING:
        return
    with pytest.raises(InputError, match=f"fc1: pruner {name} needs the {pruner.needs.value}"):
        pruner.prune(torch.ones(4, 8), None, pattern, layer="fc1")
    with pytest.raises(InputError, match="fc1 has 16 input columns but its statistics have 8"):
        pruner.prune(torch.ones(4, 16), statistics, pattern, layer="fc1")
    with pytest.raises(InputError, match="empty: no calibration token"):
        pruner.prune(torch.ones(4, 8), statistics_for(pruner.needs, 8), pattern)
    poisoned = statistics_for(pruner.needs, 8, name="model.fc1")
    poisoned.update(torch.tensor([[1.0, torch.nan] * 4]))
    with pytest.raises(InputError, match=r"calibration input of model\.fc1 holds NaN"):
        pruner.prune(torch.ones(4, 8), poisoned, pattern)


# Against the papers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", PATTERNS)
def test_magnitude_follows_the_reference(text: str, dtype: torch.dtype, device: str) -> None:
    pattern = SparsityPattern.parse(text)
    # Few distinct values, so that ties decide many masks.
    weight = (gaussian(23, 96, seed=5) * 4).round().div(4).to(dtype)
    pruned, mask = pruners.get("magnitude").prune(weight.to(device), None, pattern)
    keep = pruner_references.magnitude(weight, pattern)
    assert torch.equal(mask.keep.cpu(), keep)
    assert torch.equal(pruned.cpu(), Mask(pattern, keep).apply(weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("text", PATTERNS)
def test_wanda_follows_the_reference(text: str, device: str) -> None:
    pattern, weight, x = SparsityPattern.parse(text), gaussian(23, 96, seed=6), correlated(50, 96, seed=7)
    norms = InputNorms(96, device)
    norms.update(x)
    pruned, mask = pruners.get("wanda").prune(weight.to(device), norms, pattern)
    keep = pruner_references.wanda(weight, x, pattern)
    assert torch.equal(mask.keep.cpu(), keep)
    assert torch.equal(pruned.cpu(), Mask(pattern, keep).apply(weight))
    if pattern.sparsity is not None:
        assert set(mask.keep.sum(1).tolist()) == {96 - round(pattern.sparsity * 96)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [96, 288])
@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_follows_the_reference(text: str, columns: int, device: str) -> None:
    pattern, weight, x = SparsityPattern.parse(text), gaussian(11, columns, seed=8), correlated(2 * columns, columns, seed=9)
    pruned, mask = pruners.get("sparsegpt").prune(weight.to(device), hessian_of(x, device), pattern)
    expected, keep = pruner_references.sparsegpt(weight, x, pattern)
    assert torch.equal(mask.keep.cpu(), keep)
    assert (pruned.cpu() - expected).norm() / expected.norm() < 1e-5


def test_sparsegpt_rounds_a_bf16_weight_only_at_the_end() -> None:
    pattern, weight, x = SparsityPattern.parse("2:4"), gaussian(16, 128, seed=10).bfloat16(), correlated(256, 128, seed=11)
    pruned, mask = pruners.get("sparsegpt").prune(weight, hessian_of(x), pattern)
    in_fp32, same = pruners.get("sparsegpt").prune(weight.float(), hessian_of(x), pattern)
    assert torch.equal(mask.keep, same.keep)
    assert torch.equal(pruned, in_fp32.bfloat16())


@pytest.mark.parametrize("text", ["1:2", "2:4", "4:8", "16:32"])
def test_sparsegpt_with_uncorrelated_inputs_is_magnitude(text: str) -> None:
    pattern, weight = SparsityPattern.parse(text), gaussian(9, 256, seed=12)
    pruned, mask = pruners.get("sparsegpt").prune(weight, hessian_of(torch.eye(256)), pattern)
    expected, expected_mask = pruners.get("magnitude").prune(weight, None, pattern)
    assert torch.equal(mask.keep, expected_mask.keep)
    assert torch.equal(pruned, expected)


@pytest.mark.parametrize("text", ["0.5", "2:4", "4:8"])
def test_more_statistics_reconstruct_better(text: str) -> None:
    pattern, weight, x = SparsityPattern.parse(text), gaussian(128, 256, seed=13), correlated(1024, 256, seed=14)
    statistics = hessian_of(x)
    error = {name: ((weight - pruners.get(name).prune(weight, statistics, pattern)[0]) @ x.T).norm() for name in pruners.all_pruners()}
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


# Degenerate Hessians


def test_dead_columns_lose_their_weights_and_disturb_no_other() -> None:
    x = correlated(400, 64, seed=15)
    x[:, [5, 40]] = 0
    weight = gaussian(20, 64, seed=16)
    pruned, mask = pruners.get("sparsegpt").prune(weight, hessian_of(x), SparsityPattern.parse("2:4"))
    expected, keep = pruner_references.sparsegpt(weight, x, SparsityPattern.parse("2:4"))
    assert not bool(pruned[:, [5, 40]].any())
    assert not bool(mask.keep[:, [5, 40]].any())
    assert torch.equal(mask.keep, keep)
    assert (pruned - expected).norm() / expected.norm() < 1e-5


def test_singular_hessian_needs_only_the_usual_damping(caplog: pytest.LogCaptureFixture) -> None:
    x = correlated(10, 64, seed=17)
    weight = gaussian(20, 64, seed=18)
    with caplog.at_level(logging.WARNING, logger="sparse_engine"):
        pruned, _ = pruners.get("sparsegpt").prune(weight, hessian_of(x), SparsityPattern.parse("2:4"))
    assert caplog.messages == []
    magnitude, _ = pruners.get("magnitude").prune(weight, None, SparsityPattern.parse("2:4"))
    assert ((weight - pruned) @ x.T).norm() < 0.5 * ((weight - magnitude) @ x.T).norm()


class FixedHessian(Hessian):
    """A Hessian given as a matrix, which need not be one that activations can produce."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0], name="model.fc2")
        self._sum, self.count = matrix / 2, 1


@pytest.mark.parametrize("lowest", [-0.05, -3.0, -1e4])
def test_indefinite_hessian_is_logged_and_never_fatal(lowest: float, caplog: pytest.LogCaptureFixture) -> None:
    rotation = torch.linalg.qr(gaussian(64, 64, seed=19).double()).Q
    eigenvalues = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
    eigenvalues[0] = lowest
    matrix = (rotation * eigenvalues @ rotation.T).float()
    with caplog.at_level(logging.WARNING, logger="sparse_engine"):
        pruned, mask = pruners.get("sparsegpt").prune(gaussian(8, 64, seed=20), FixedHessian(matrix), SparsityPattern.parse("4:8"))
    assert len(caplog.messages) == 1
    assert "model.fc2 is not positive definite" in caplog.text
    assert torch.isfinite(pruned).all()
    assert mask.nnz == 8 * 32


def test_a_factorisation_that_fails_in_fp32_is_done_in_fp64(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    factor = sparsegpt._factor
    monkeypatch.setattr(sparsegpt, "_factor", lambda h: (h, True) if h.dtype is torch.float32 else factor(h))
    weight, x, pattern = gaussian(8, 64, seed=26), correlated(100, 64, seed=27), SparsityPattern.parse("4:8")
    with caplog.at_level(logging.WARNING, logger="sparse_engine"):
        pruned, mask = pruners.get("sparsegpt").prune(weight, hessian_of(x), pattern)
    assert "not positive definite in fp32: used damping 0.01 in torch.float64" in caplog.text
    expected, keep = pruner_references.sparsegpt(weight, x, pattern)
    assert torch.equal(mask.keep, keep)
    assert (pruned - expected).norm() / expected.norm() < 1e-5


def test_inputs_that_are_all_zero_leave_a_zero_weight() -> None:
    pruned, mask = pruners.get("sparsegpt").prune(gaussian(4, 32, seed=21), hessian_of(torch.zeros(3, 32)), SparsityPattern.parse("0.5"))
    assert not bool(pruned.any())
    assert mask.nnz == 64


# Statistics


def test_hessian_is_the_mean_outer_product() -> None:
    x = correlated(700, 300, seed=22)
    exact = 2 * x.double().T @ x.double() / 700
    matrix = hessian_of(x).matrix
    assert torch.equal(matrix, matrix.T)
    assert (matrix - exact).norm() / exact.norm() < 1e-6
    assert torch.allclose(hessian_of(x).norms.double(), x.double().norm(dim=0), rtol=1e-5)


@pytest.mark.parametrize("kind", [InputNorms, Hessian])
def test_statistics_do_not_depend_on_how_batches_are_split(kind: type[Statistics], monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated(60, 24, seed=23)
    whole, pieces = kind(24), kind(24)
    whole.update(x)
    monkeypatch.setattr("sparse_engine.calibrate.CHUNK_ELEMENTS", 24 * 7)
    for part in (x[:1], x[1:1], x[1:41].reshape(2, 20, 24), x[41:]):
        pieces.update(part)
    assert whole.count == pieces.count == 60
    assert torch.allclose(whole.norms, pieces.norms, rtol=1e-5)
    assert torch.allclose(whole.norms.double(), x.double().norm(dim=0), rtol=1e-5)


def test_bf16_activations_are_squared_in_fp32() -> None:
    norms = InputNorms(4)
    norms.update(torch.ones(1000, 4, dtype=torch.bfloat16))
    assert torch.allclose(norms.norms, torch.full((4,), 1000.0).sqrt())


def test_statistics_refuse_other_widths_and_hold_only_what_was_asked() -> None:
    with pytest.raises(InputError, match=r"fc1 is \(2, 3\), expected 4"):
        InputNorms(4, name="fc1").update(torch.ones(2, 3))
    counter = statistics_for(Needs.NOTHING, 4, name="fc1")
    counter.update(torch.ones(2, 5, 4))
    assert counter.count == 10
    with pytest.raises(InputError, match="fc1 hold no input norms"):
        _ = counter.norms
    norms = statistics_for(Needs.INPUT_NORMS, 4)
    norms.update(torch.ones(2, 4))
    with pytest.raises(InputError, match="sparsegpt needs the Hessian of calibration data, got InputNorms"):
        pruners.get("sparsegpt").prune(torch.ones(2, 4), norms, SparsityPattern.parse("2:4"))


@pytest.mark.gpu
def test_hessian_ignores_a_users_tf32_setting() -> None:
    x = correlated(512, 256, seed=24).cuda()
    exact = 2 * x.double().T @ x.double() / 512
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        matrix = hessian_of(x, "cuda").matrix
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (matrix - exact).norm() / exact.norm() < 1e-6


# Selection


@pytest.mark.parametrize("count", [0, 1, 5, 250, 499, 500])
@pytest.mark.parametrize("levels", [1, 3, 10_000])
def test_overall_selection_is_exact_in_small_chunks(levels: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_engine.pruners.base.CHUNK_ELEMENTS", 60)
    scores = torch.randint(levels, (20, 25), generator=torch.Generator().manual_seed(levels)).float() * 1e-3
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    expected = torch.zeros(500, dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(keep_largest_overall(scores, count), expected.view(20, 25))


def test_group_selection_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = gaussian(50, 64, seed=25).abs()
    whole = keep_largest(scores, 3, 8)
    assert scores.numel() < CHUNK_ELEMENTS
    monkeypatch.setattr("sparse_engine.pruners.base.CHUNK_ELEMENTS", 100)
    assert torch.equal(keep_largest(scores, 3, 8), whole)
