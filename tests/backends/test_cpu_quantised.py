"""The CPU kernels for int8 and int4 values: against fp64 of the levels by activations quantised as the kernels say they do."""

from __future__ import annotations

import pytest
import torch
from cpu_products import TOLERANCE, Fenced, library_arguments, needs_library, nm, random_keep
from torch import Tensor

from sparse_engine import Mask, PackedWeight, SparseLinear, SparsityPattern, formats, native, registry, value_types
from sparse_engine.errors import InputError

pytestmark = [needs_library, pytest.mark.usefixtures("one_thread")]

KINDS = ["int8", "int4"]
SHAPES = [(1, 8), (3, 4), (5, 12), (7, 64), (33, 96), (13, 100), (200, 128), (6, 320), (17, 2080)]
ODD_SHAPES = [(1, 1), (3, 7), (5, 63), (4, 65), (9, 129), (11, 1001)]
CASES = [
    (p, s) for p in ("1:2", "2:4", "3:4", "4:8", "3:8", "7:8", "3:32") for s in SHAPES if s[1] % SparsityPattern.parse(p).group[1] == 0
] + [(p, s) for p in ("0.5", "0.9", "0.05") for s in SHAPES[-3:] + ODD_SHAPES]


def pack(text: str, shape: tuple[int, int], kind: str, dtype: torch.dtype = torch.float32) -> PackedWeight:
    pattern = SparsityPattern.parse(text)
    weight = torch.randn(shape).to(dtype)
    return formats.for_pattern(pattern).pack(weight, Mask(pattern, random_keep(pattern, shape)), value_type=kind)


def exact_weight(packed: PackedWeight) -> Tensor:
    """float64 level · scale."""
    fmt = formats.get(packed.format)
    keep, scales = fmt.keep(packed), packed.tensors["scales"].double()
    levels = torch.zeros(packed.shape, dtype=torch.float64).masked_scatter_(keep, fmt.levels(packed).double())
    if packed.value_type == "int8":
        return levels * scales[:, None]
    return levels * scales.repeat_interleave(128, 1)[:, : packed.shape[1]]


def quantised(x: Tensor) -> Tensor:
    """float64 of int8 activations: scale = max |x| / 127 of each row, in fp32, rounded to nearest even."""
    most = x.float().abs().amax(-1, keepdim=True)
    levels = torch.where(most > 0, (x.float() * (127.0 / most)).round(), 0.0)
    return levels.double() * (most / 127.0).double()


def product(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """The library's product into NaN-filled memory with guard words on both sides."""
    rows = packed.shape[0]
    whole = torch.full((x.shape[0] * rows + 32,), float("nan"), dtype=x.dtype)
    out = whole[16 : 16 + x.shape[0] * rows].view(x.shape[0], rows)
    native.linear(x, *library_arguments(packed), bias, *nm(packed), out, 2)
    assert torch.isnan(whole[:16]).all(), "wrote in front of the output"
    assert torch.isnan(whole[16 + out.numel() :]).all(), "wrote behind the output"
    return out


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert torch.isfinite(actual).all()
    scale, error = float(wanted.norm()), float((actual.double() - wanted).norm())
    assert error <= tolerance * scale, f"relative error {error / scale if scale else error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_product(pattern: str, shape: tuple[int, int], kind: str, level: str) -> None:
    torch.manual_seed(0)
    packed = pack(pattern, shape, kind)
    weight, bias = exact_weight(packed), torch.randn(shape[0])
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33):
        x = torch.randn(m, shape[1])
        with_bias = bias if m % 2 else None
        wanted = quantised(x) @ weight.T + (0 if with_bias is None else with_bias.double())
        assert_near(product(x, packed, with_bias), wanted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pattern", "shape", "m"), [("2:4", (401, 136), 161), ("0.5", (29, 2500), 33), ("4:8", (26, 4104), 131)], ids=str)
def test_product_of_several_panels_and_passes(pattern: str, shape: tuple[int, int], m: int, kind: str, level: str) -> None:
    torch.manual_seed(0)
    packed = pack(pattern, shape, kind)
    x, bias = torch.randn(m, shape[1]), torch.randn(shape[0])
    assert_near(product(x, packed, bias), quantised(x) @ exact_weight(packed).T + bias.double(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("pattern", "shape"), [("2:4", (65, 768)), ("4:8", (40, 768)), ("0.5", (37, 515))], ids=str)
def test_layer_is_near_the_product_of_the_activations_as_they_are(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype, kind: str, level: str
) -> None:
    """Rounding Gaussian activations to int8 costs about 1 % of the result's norm."""
    torch.manual_seed(0)
    packed = pack(pattern, shape, kind, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    layer = SparseLinear.from_packed(packed, bias, backend="cpu")
    for m in (1, 3, 8, 40, 130):
        x = torch.randn(m, shape[1]).to(dtype)
        actual = layer(x)
        assert actual.dtype == dtype
        assert_near(actual, x.double() @ exact_weight(packed).T + bias.double(), 2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_expanded_tiles(pattern: str, shape: tuple[int, int], kind: str, level: str) -> None:
    torch.manual_seed(0)
    packed = pack(pattern, shape, kind)
    weight = exact_weight(packed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        begin, end = shape[0] // 3, shape[0]
        whole = torch.full(((end - begin) * shape[1] + 32,), float("nan"), dtype=dtype)
        out = whole[16 : whole.numel() - 16].view(end - begin, shape[1])
        native.expand_tile(*library_arguments(packed), *nm(packed), shape[1], begin, end, out, 2)
        # The product of level and scale is exact in fp64 and rounded in fp32 first, at most half a unit off when rounded again.
        torch.testing.assert_close(out.double(), weight[begin:end], rtol=1.01 * torch.finfo(dtype).eps, atol=1e-7)
        assert torch.equal(out == 0, weight[begin:end].to(dtype) == 0)
        assert torch.isnan(whole[:16]).all()
        assert torch.isnan(whole[-16:]).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 31), (6, 33), (9, 129), (130, 1001), (8, 2048)], ids=str)
def test_dense_int8_product(shape: tuple[int, int], level: str) -> None:
    torch.manual_seed(0)
    fence = Fenced()
    try:
        weight = fence.place(torch.randint(-127, 128, shape, dtype=torch.int8))
        scales, bias = fence.place(torch.rand(shape[0])), fence.place(torch.randn(shape[0]))
        for m in (1, 2, 3, 5, 8, 9, 33):
            x = fence.place(torch.randn(m, shape[1]))
            out = fence.place(torch.full((m, shape[0]), float("nan")))
            native.dense_linear(x, weight, bias, out, 2, scales)
            assert_near(out, quantised(x) @ (weight.double() * scales.double()[:, None]).T + bias.double(), 1e-5)
    finally:
        fence.open()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pattern", "shape"), [c for c in CASES if c[0] in ("2:4", "7:8", "3:8", "0.5", "0.9")], ids=lambda v: str(v))
def test_nothing_behind_the_tensors_is_read(pattern: str, shape: tuple[int, int], kind: str, level: str) -> None:
    torch.manual_seed(0)
    fence = Fenced()
    try:
        packed = pack(pattern, shape, kind)
        tensors = tuple(None if t is None else fence.place(t) for t in library_arguments(packed))
        for m in (1, 3, 33):
            x = fence.place(torch.randn(m, shape[1]))
            out = fence.place(torch.full((m, shape[0]), float("nan")))
            native.linear(x, *tensors, None, *nm(packed), out, 2)
            assert_near(out, quantised(x) @ exact_weight(packed).T, 1e-5)
        tile = fence.place(torch.full(shape, float("nan")))
        native.expand_tile(*tensors, *nm(packed), shape[1], 0, shape[0], tile, 2)
        assert_near(tile, exact_weight(packed), 1e-6)
    finally:
        fence.open()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_activations_and_levels(kind: str, level: str) -> None:
    """Every product at its largest, which saturates 16-bit sums that are formed carelessly; rows of zeros; and what is not finite."""
    largest = {"int8": 1.0, "int4": 1.0}[kind]
    pattern = SparsityPattern.unstructured(0.5)
    weight = torch.full((3, 4096), largest)
    weight[1] = -largest
    packed = formats.for_pattern(pattern).pack(weight, Mask(pattern, torch.ones(3, 4096, dtype=torch.bool)), value_type=kind)
    x = torch.ones(4, 4096)
    x[1], x[2] = -3.0, 0.0
    x[3, ::2] = 1e-41  # fp32 subnormals beside 1: they round to 0
    out = product(x, packed, None)
    assert_near(out, quantised(x) @ exact_weight(packed).T, 1e-5)
    assert float(out[0, 0]) == pytest.approx(4096, rel=1e-3)
    assert torch.equal(out[2], torch.zeros(3))
    for value in (float("nan"), float("inf")):
        x[3, 100] = value
        out = product(x, packed, None)
        assert not torch.isfinite(out[3]).any(), "a result that is not finite must not pass as a number"
        assert torch.isfinite(out[:3]).all()


def test_sums_of_very_long_rows_do_not_overflow(level: str) -> None:
    """2^24 columns of the largest products: more than int32 lanes hold."""
    columns = 1 << 24
    bitmask = torch.full((1, columns // 8), 255, dtype=torch.uint8)
    values, scales = torch.full((1, columns), 127, dtype=torch.int8), torch.ones(1)
    x, out = torch.ones(1, columns), torch.full((1, 1), float("nan"))
    native.linear(x, values, scales, bitmask, torch.tensor([0, columns]), None, 0, 0, out, 1)
    assert float(out) == pytest.approx(127.0 * columns, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_activations(kind: str, level: str) -> None:
    torch.manual_seed(0)
    packed = pack("2:4", (40, 96), kind)
    layer = SparseLinear.from_packed(packed, torch.randn(40), backend="cpu")
    x = torch.randn(2, 33, 96, requires_grad=True)
    gradient = torch.randn(2, 33, 40)
    layer(x).backward(gradient)
    assert_near(x.grad, gradient.double() @ exact_weight(packed), TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_operator_contract(pattern: str, kind: str) -> None:
    registry.get("cpu")  # which defines its operator
    packed = pack(pattern, (16, 64), kind)
    tensors = (packed.tensors["values"], packed.tensors["bitmask"], packed.tensors.get("row_offsets"), packed.tensors["scales"])
    torch.library.opcheck(torch.ops.sparse_engine.cpu_linear.default, (torch.randn(3, 64), *tensors, torch.randn(16), *nm(packed)))


@pytest.mark.parametrize("kind", KINDS)
def test_registry_prefers_the_native_kernel(kind: str) -> None:
    assert kind in value_types.all_value_types()
    for pattern in ("4:8", "0.5"):
        packed = pack(pattern, (64, 64), kind, torch.bfloat16)
        for rows in registry.ROW_BUCKETS:
            assert registry.select(registry.Problem.of(packed, rows)).name == "cpu"


def test_mismatched_arguments_are_named() -> None:
    packed = pack("2:4", (16, 64), "int4")
    run = registry.get("cpu").run
    with pytest.raises(InputError, match="x has 72 columns"):
        run(torch.randn(1, 72), packed.tensors, None, packed.pattern)
    with pytest.raises(InputError, match="convert them to one type"):
        run(torch.randn(1, 64), packed.tensors, torch.randn(16, dtype=torch.bfloat16), packed.pattern)
