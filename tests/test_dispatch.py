"""Which kernel a layer gets: the policy on dense copies, few layouts, and what a layer holds in the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from products import random_keep
from torch import Tensor

from sparse_engine import SparseLinear, formats, registry, tuning
from sparse_engine.cli.inspect import _compact, _why_line
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.plan import PROMPT_MOST, fewest_layouts, held_nbytes, kernels_for
from sparse_engine.policy import UNLIMITED, Policy
from sparse_engine.registry import PROMPT_GAIN, ROW_BUCKETS, Problem
from sparse_engine.tuning import Entry, Measured

GPU = "Test GPU 9000"
SHAPE = (64, 128)
BF16 = torch.bfloat16
PROBLEM = Problem("nm", SparsityPattern.nm(2, 4), BF16, "cuda", *SHAPE, 1, (9, 0), GPU)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
CPU = torch.device("cpu")


def make_packed(pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> PackedWeight:
    """A random weight with a zero row, kept zeros, and for an unstructured pattern rows that keep everything and nothing."""
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    parsed = SparsityPattern.parse(pattern)
    weight = torch.randn(shape, generator=generator)
    if parsed.is_nm:
        keep = random_keep(shape, parsed, generator)
    else:
        keep = torch.rand(shape, generator=generator) < parsed.density
        keep[0], keep[-1] = True, False
    weight[shape[0] // 2] = 0.0
    weight[torch.rand(shape, generator=generator) < 0.1] = -0.0
    return formats.for_pattern(parsed).pack(weight.to(dtype), Mask(parsed, keep)).to(device)


def same(one: PackedWeight, other: PackedWeight) -> bool:
    """Bit for bit, so that 0.0 and -0.0 differ."""
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor.view(torch.uint8), other.tensors[name].view(torch.uint8)) for name, tensor in one.tensors.items()
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("pattern", "shape"), [("2:4", (48, 80)), ("1:8", (5, 24)), ("0.5", (33, 131)), ("0.9", (3, 7))])
def test_dense_gives_back_the_packed_weight(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = make_packed(pattern, shape, dtype)
    # A checkpoint from elsewhere may hold kept values of -0.0, which pack() itself never writes.
    packed.tensors["values"].flatten()[::7] = -0.0
    kernel = registry.get("dense")
    layout = kernel.prepare(packed)
    assert same(kernel.recover(layout, replace(packed, tensors={})), packed)
    held = sum(t.numel() * t.element_size() for t in layout.values())
    assert held == kernel.layout_nbytes(Problem.of(packed, 1), packed)


def _check_product(pattern: str, shape: tuple[int, int], dtype: torch.dtype, rows: int, device: str) -> None:
    packed = make_packed(pattern, shape, dtype, device)
    kernel = registry.get("dense")
    layout = kernel.prepare(packed)
    dense = formats.get(packed.format).unpack(packed).double()
    x = torch.randn(rows, shape[1], dtype=dtype, device=device)
    strided = torch.randn(2, rows, 2 * shape[1], dtype=dtype, device=device)[..., ::2]
    for bias in (None, torch.randn(shape[0], dtype=dtype, device=device)):
        for activations in (x, strided):
            want: Tensor = torch.nn.functional.linear(activations.double(), dense, None if bias is None else bias.double())
            torch.full_like(want, float("nan"), dtype=dtype)
            got = kernel.run(activations, layout, bias, packed.pattern)
            assert got.shape == want.shape
            assert float((got.double() - want).norm() / want.norm().clamp_min(1e-30)) < TOLERANCE[dtype]


CASES = [("2:4", (48, 80)), ("4:8", (33, 264)), ("0.5", (33, 131)), ("0.7", (1, 3))]


@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_dense_product(pattern: str, shape: tuple[int, int]) -> None:
    _check_product(pattern, shape, torch.float32, 3, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 7, 17, 129])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_dense_product_on_a_gpu(pattern: str, shape: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    _check_product(pattern, shape, dtype, rows, "cuda")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three kernels beside dense and the reference on a GPU without any measured time: packed, sparse (in place) and other."""
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))

    def kernel(called: str, *, reads_packed: bool) -> registry.Kernel:
        class Fake(registry.Kernel):
            name = called
            formats = frozenset({"nm"})
            devices = frozenset({"cuda", "cpu"})
            dtypes = frozenset({BF16})
            in_place = reads_packed

            def cost(self, problem: Problem) -> float:
                return 10.0

            def prepare(self, packed: PackedWeight) -> registry.Layout:
                return packed.tensors if reads_packed else {name: t.clone() for name, t in packed.tensors.items()}

            def run(self, x: Tensor, layout: registry.Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
                return x.new_full((*x.shape[:-1], layout["values"].shape[0]), ord(called[0]))

        return Fake()

    fakes = {name: kernel(name, reads_packed=name == "sparse") for name in ("packed", "sparse", "other")}
    every = fakes | {name: registry.get(name) for name in ("dense", "reference")}
    monkeypatch.setattr(registry, "all_kernels", lambda: every)


def measure(rows: int, **us: float) -> None:
    measured = {name: Measured(value) for name, value in us.items()}
    tuning.record(GPU, [Entry("2:4", BF16, SHAPE, rows, measured)])


def reason_against_dense(policy: Policy = UNLIMITED) -> str | None:
    return next(v.reason for v in registry.explain(PROBLEM, policy) if v.kernel == "dense")


@pytest.mark.usefixtures("table")
def test_dense_is_no_choice_without_a_measured_time() -> None:
    assert "was not measured" in str(reason_against_dense())
    measure(1, packed=5.0)
    assert "was not measured" in str(reason_against_dense())
    assert registry.select(PROBLEM).name == "packed"


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("packed_us", "chosen"), [(10.3, "dense"), (10.2, "packed"), (9.0, "packed")])
def test_dense_is_chosen_where_it_is_faster_by_more_than_two_percent(packed_us: float, chosen: str) -> None:
    measure(1, dense=10.0, packed=packed_us, other=50.0)
    assert registry.select(PROBLEM).name == chosen
    assert (reason_against_dense() is None) == (chosen == "dense")
    assert registry.select(PROBLEM, policy=Policy("never")).name == "packed"
    assert registry.select(PROBLEM, "dense", Policy("never")).name == "dense", "asked for by name it runs"


@pytest.mark.usefixtures("table")
def test_dense_needs_room_unless_it_is_always_allowed() -> None:
    measure(1, dense=1.0, packed=2.0)
    enough = SHAPE[0] * SHAPE[1] * 2
    assert reason_against_dense(Policy("auto", enough)) is None
    assert "less than half" in str(reason_against_dense(Policy("auto", enough - 1)))
    assert reason_against_dense(Policy("always")) is None


def test_policy_comes_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_ENGINE_DENSE", raising=False)
    assert Policy.here(CPU) == Policy("auto", math.inf)
    monkeypatch.setenv("SPARSE_ENGINE_DENSE", "never")
    assert Policy.here(CPU) == Policy("never")
    assert Policy.here(CPU, "always") == Policy("always")
    with pytest.raises(InputError, match="dense is 'often': use auto, never, always"):
        Policy.here(CPU, "often")
    monkeypatch.setenv("SPARSE_ENGINE_DENSE", "yes")
    with pytest.raises(InputError, match="SPARSE_ENGINE_DENSE is 'yes'"):
        Policy.here(CPU)


@pytest.mark.parametrize(
    ("options", "in_place", "expected"),
    [
        ([{"a": 1.0}, {"b": 1.0}], set(), ["a", "b"]),
        ([{"a": 1.0}, {"b": 1.0, "a": 1.01}], set(), ["a", "a"]),
        # One kernel that is never the fastest serves all three.
        ([{"a": 1.0, "c": 1.02}, {"b": 1.0, "c": 1.02}, {"c": 1.0}], set(), ["c", "c", "c"]),
        # Kernels in place share the packed tensors, so each bucket has its fastest.
        ([{"a": 1.0}, {"b": 1.0, "a": 1.01}], {"a", "b"}, ["a", "b"]),
        # Two layouts are needed anyhow; the least time decides which.
        ([{"a": 1.0}, {"b": 1.0}, {"a": 1.02, "b": 1.01}], set(), ["a", "b", "b"]),
    ],
)
def test_fewest_layouts(options: list[dict[str, float]], in_place: set[str], expected: list[str]) -> None:
    assert fewest_layouts(options, in_place) == expected


@pytest.mark.usefixtures("table")
def test_a_kernel_that_is_nearly_as_fast_saves_a_layout() -> None:
    for rows in ROW_BUCKETS:
        measure(rows, packed=10.0 if rows != 16 else 10.1, other=30.0 if rows != 16 else 10.0)
    assert {step.kernel.name for step in kernels_for(PROBLEM)} == {"packed"}
    measure(16, packed=10.5)
    assert [step.kernel.name for step in kernels_for(PROBLEM) if step.kernel.name != "packed"] == ["other"]


@pytest.mark.usefixtures("table")
def test_a_saved_layout_costs_nothing_against_dense() -> None:
    for rows in ROW_BUCKETS:
        measure(rows, packed=10.0, other=30.0, dense=20.0)
    # Each is within 2 % of the one before, but packed is not within 2 % of dense.
    measure(16, dense=10.0, other=10.15, packed=10.3)
    assert [step.kernel.name for step in kernels_for(PROBLEM) if step.rows == 16] == ["other"]
    measure(16, dense=10.2)
    assert {step.kernel.name for step in kernels_for(PROBLEM)} == {"packed"}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("kernel", ["dense", "other"])
def test_prompts_alone_must_gain_more_from_a_layout_of_their_own(kernel: str) -> None:
    prompts = [rows for rows in ROW_BUCKETS if rows > 128]
    for rows in ROW_BUCKETS:
        measure(rows, packed=10.0, other=30.0, dense=20.0)

    def of_prompts() -> set[str]:
        steps = kernels_for(PROBLEM)
        assert {step.kernel.name for step in steps if step.rows <= 128} == {"packed"}
        return {step.kernel.name for step in steps if step.rows > 128}

    # Little for prompts of all lengths, then much.
    for packed, expected in ((10.0 * PROMPT_GAIN - 0.1, "packed"), (10.0 * PROMPT_GAIN + 0.1, kernel)):
        for rows in prompts:
            measure(rows, packed=packed, **{"dense": 20.0, "other": 30.0} | {kernel: 10.0})
        assert of_prompts() == {expected}
    # Much for some lengths, nothing for others; then so much for one that it is worth the layout.
    for rows in prompts[1:]:
        measure(rows, packed=10.0, **{kernel: 20.0})
    for packed, expected in ((10.0 * PROMPT_MOST - 0.1, {"packed"}), (10.0 * PROMPT_MOST + 0.1, {"packed", kernel})):
        measure(prompts[0], packed=packed)
        assert of_prompts() == expected


@pytest.mark.usefixtures("table")
def test_a_dense_copy_that_is_held_serves_wherever_it_is_faster() -> None:
    for rows in ROW_BUCKETS:
        measure(rows, packed=10.0, other=30.0, dense=20.0)
    measure(512, packed=10.5, dense=10.0)
    assert {step.kernel.name for step in kernels_for(PROBLEM)} == {"packed"}
    measure(64, packed=10.5, dense=10.0)
    assert [step.rows for step in kernels_for(PROBLEM) if step.kernel.name == "dense"] == [64, 512]
    assert {step.kernel.name for step in kernels_for(PROBLEM, policy=Policy("never"))} == {"packed"}


@pytest.mark.usefixtures("table")
def test_a_kernel_may_be_no_choice_unless_it_is_forced() -> None:
    for rows in ROW_BUCKETS:
        measure(rows, packed=10.0, other=5.0, sparse=20.0)
    assert {step.kernel.name for step in kernels_for(PROBLEM)} == {"other"}
    assert {step.kernel.name for step in kernels_for(PROBLEM, without={"other"})} == {"packed"}
    assert {step.kernel.name for step in kernels_for(PROBLEM, "other", without={"other"})} == {"other"}


@pytest.mark.usefixtures("table")
def test_layers_that_share_a_weight_have_no_kernel_whose_layout_cannot_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = registry.all_kernels()

    class Cuttable(type(fakes["packed"])):  # type: ignore[misc]
        def rows_of(self, layout: registry.Layout, begin: int, end: int) -> registry.Layout:
            return {name: tensor[begin:end] for name, tensor in layout.items()}

    monkeypatch.setattr(registry, "all_kernels", lambda: {**fakes, "packed": Cuttable()})
    monkeypatch.setattr(Cuttable, "cost", lambda self, problem: 1.0)
    monkeypatch.setattr(type(fakes["other"]), "cost", lambda self, problem: 0.5)
    parts = [SparseLinear.from_packed(make_packed("2:4", SHAPE, BF16)) for _ in range(2)]
    assert {kernel.name for _, kernel, _ in SparseLinear.from_packed(parts[0].packed).plan()} == {"other"}
    whole = SparseLinear.stacked(parts)
    assert whole is not None
    assert {kernel.name for layer in (whole, *parts) for _, kernel, _ in layer.plan()} == {"packed"}


@pytest.mark.usefixtures("table")
def test_a_weight_is_held_once_where_copies_are_never_allowed_or_have_no_room() -> None:
    for rows in ROW_BUCKETS:
        measure(rows, packed=10.0, other=30.0, dense=20.0)
    measure(512, packed=50.0, other=10.0)
    for policy in (Policy(), Policy("auto", PROBLEM.packed_nbytes), Policy("always", 0.0)):
        assert {step.kernel.name for step in kernels_for(PROBLEM, policy=policy)} == {"packed", "other"}
    for policy in (Policy("never"), Policy("auto", PROBLEM.packed_nbytes - 1), Policy("auto", -1e9)):
        assert {step.kernel.name for step in kernels_for(PROBLEM, policy=policy)} == {"packed"}


@pytest.mark.usefixtures("table")
def test_a_time_of_the_other_type_is_no_time_where_types_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    half = replace(PROBLEM, dtype=torch.float16)
    kernels = registry.all_kernels()
    for name in ("packed", "other"):
        monkeypatch.setattr(type(kernels[name]), "dtypes", frozenset({BF16, torch.float16}))
    measure(1, packed=10.0, other=5.0)
    assert registry.select(half).name == "other"
    monkeypatch.setattr(type(kernels["other"]), "types_alike", False)
    assert registry.select(half).name == "packed"
    assert registry.select(PROBLEM).name == "other"


@pytest.mark.usefixtures("table")
def test_an_estimate_stands_in_for_no_measured_time() -> None:
    measure(1, packed=10.1)
    steps = kernels_for(PROBLEM)
    assert steps[0].kernel.name == "packed"
    assert steps[0].verdict.source == tuning.USER
    assert steps[1].verdict.source == registry.ESTIMATE


def test_a_kernel_that_rejects_a_bucket_is_an_error_when_forced() -> None:
    with pytest.raises(KernelUnavailableError, match="runs on cpu, not cuda"):
        kernels_for(PROBLEM, "cpu")


def _layer(monkeypatch: pytest.MonkeyPatch, choice: dict[int, str]) -> tuple[SparseLinear, PackedWeight]:
    """A layer on the CPU whose buckets are ``choice``'s, the last for the rest."""
    monkeypatch.setattr(Problem, "measured", lambda self: {choice.get(self.rows, choice[max(choice)]): Measured(1.0)})
    packed = make_packed("2:4", SHAPE, BF16)
    kept = PackedWeight(packed.format, 1, packed.pattern, packed.shape, packed.dtype, {n: t.clone() for n, t in packed.tensors.items()})
    return SparseLinear.from_packed(packed), kept


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("choice", "copies", "dense", "released"),
    [
        ({1: "packed"}, 1, 0, True),
        ({1: "sparse"}, 1, 0, False),
        ({1: "packed", 2: "other"}, 2, 0, True),
        ({1: "packed", 2: "sparse"}, 2, 0, False),
        ({1: "packed", 2: "dense"}, 1, 1, True),
        ({1: "dense"}, 0, 1, True),
    ],
    ids=str,
)
def test_a_layer_holds_what_its_kernels_read_and_gives_its_weight_back(
    choice: dict[int, str], copies: int, dense: int, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, packed = _layer(monkeypatch, choice)
    steps = layer.plan()
    assert {kernel.name for _, kernel, _ in steps} == set(choice.values())
    assert [rows for rows, _, _ in steps] == [*list(choice)[:-1], ROW_BUCKETS[-1]]
    bitmask = packed.tensors["bitmask"].numel()
    assert layer.nbytes == copies * packed.nbytes + dense * (packed.dense_nbytes + bitmask)
    assert (layer.values.numel() == 0) == released
    assert same(layer.packed, packed)
    assert torch.equal(layer.state_dict()["values"], packed.tensors["values"])
    for rows, kernel, _ in steps:
        y = layer(torch.ones(rows, SHAPE[1], dtype=BF16))
        assert y.shape == (rows, SHAPE[0])
        if kernel.name != "dense":
            assert float(y[0, 0]) == ord(kernel.name[0])


def test_inspect_says_which_kernel_runs_and_where_its_time_is_from() -> None:
    def choice(kernel: str, us: float | None, source: str, form: str | None = None) -> dict[str, object]:
        return {"kernel": kernel, "form": form, "us": us, "source": source}

    measured = {"1": choice("a", 1.394, tuning.SHIPPED), "16": choice("a", 7.0, tuning.SHIPPED), "32": choice("dense", 9.0, tuning.USER)}
    rest = {"4096": choice("b", None, registry.ESTIMATE)}
    assert _compact(measured | rest) == (
        "a to M = 16 (1.39 … 7.00 µs, shipped table), dense to M = 32 (9.00 µs, user's table), b beyond (estimate)"
    )
    assert _compact({"1": choice("a", None, registry.ESTIMATE), "4096": choice("a", None, registry.ESTIMATE)}) == "a (estimate)"
    forms = {str(m): choice("a", 5.0, tuning.USER, form) for m, form in ((1, "x.cu"), (128, "x.cu"), (256, "y.cu"))}
    assert _compact(forms) == "a x.cu to M = 128 (5.00 µs, user's table), a y.cu beyond (5.00 µs, user's table)"
    verdict = {"kernel": "a", "chosen": True, "cost_us": 1.394, "reason": None, "source": tuning.USER, "config": ["x.cu", 1]}
    assert _why_line(verdict) == "a: chosen, 1.39 µs (user's table, x.cu 1)"
    assert _why_line(verdict | {"chosen": False, "reason": "is slow"}) == "a: rejected: is slow; 1.39 µs (user's table, x.cu 1)"
    assert _why_line(verdict | {"source": registry.ESTIMATE, "config": []}) == "a: chosen, estimated 1.39 µs"


@pytest.mark.usefixtures("table")
def test_held_bytes_count_every_layout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, packed = _layer(monkeypatch, {1: "sparse", 2: "dense", 4: "sparse"})
    steps = kernels_for(Problem.of(packed, 1))
    assert held_nbytes(Problem.of(packed, 1), steps, packed) == packed.nbytes + packed.dense_nbytes + packed.tensors["bitmask"].numel()
    # The layer shares the bitmask between the two.
    layer.plan()
    assert layer.nbytes == packed.nbytes + packed.dense_nbytes
    monkeypatch.setattr(Problem, "measured", lambda self: {"packed": Measured(1.0)})
    assert held_nbytes(Problem.of(packed, 1), kernels_for(Problem.of(packed, 1)), packed) is None
