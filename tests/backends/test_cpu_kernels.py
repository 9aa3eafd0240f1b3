"""The CPU kernels against fp64 of the unpacked weight, for every pattern, type, level and awkward shape; and what they may touch."""

from __future__ import annotations

import mmap

import pytest
import torch
from cpu_products import TOLERANCE, Fenced, library_arguments, needs_library, nm, random_keep
from torch import Tensor

from sparse_engine import Mask, PackedWeight, SparseLinear, SparsityPattern, formats, native, registry
from sparse_engine.errors import InputError

pytestmark = [needs_library, pytest.mark.usefixtures("one_thread")]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [0, 1, 2, 3, 5, 7, 8, 9, 17, 129]

# (out_features, in_features) by what is awkward about them; each N:M takes those that its M divides.
SHAPES = [(1, 2), (3, 4), (1, 8), (5, 12), (2, 36), (7, 64), (33, 96), (13, 100), (17, 2080), (6, 4096)]
ODD_SHAPES = [(1, 1), (3, 7), (5, 63), (4, 65), (9, 129), (31, 1001), (5, 4100)]
NM = ["1:2", "2:4", "1:4", "3:4", "4:8", "2:8", "7:8", "1:16", "8:16", "3:32", "16:32"]
CASES = [(p, s) for p in NM for s in SHAPES if s[1] % SparsityPattern.parse(p).group[1] == 0] + [
    (p, s) for p in ("0.5", "0.9", "0.05") for s in SHAPES + ODD_SHAPES
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    torch.set_num_threads(request.param)
    return request.param


def pack(pattern: str | SparsityPattern, shape: tuple[int, int], dtype: torch.dtype, keep: Tensor | None = None) -> PackedWeight:
    parsed = SparsityPattern.parse(pattern) if isinstance(pattern, str) else pattern
    mask = Mask(parsed, random_keep(parsed, shape) if keep is None else keep)
    return formats.for_pattern(parsed).pack(torch.randn(shape).to(dtype), mask)


def unpacked(packed: PackedWeight) -> Tensor:
    return formats.get(packed.format).unpack(packed)


def expected(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    product = x.double() @ unpacked(packed).double().T
    return product if bias is None else product + bias.double()


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    assert actual.shape == wanted.shape
    assert torch.isfinite(actual).all()
    scale = float(wanted.norm())
    error = float((actual.double() - wanted).norm())
    assert error <= TOLERANCE[dtype] * scale, f"relative error {error / scale if scale else error:.2e}"


def native_product(x: Tensor, packed: PackedWeight, bias: Tensor | None, threads: int) -> Tensor:
    """The library's own product into NaN-filled memory, with guard words on both sides of it."""
    rows = packed.shape[0]
    whole = torch.full((x.shape[0] * rows + 32,), float("nan"), dtype=x.dtype)
    out = whole[16 : 16 + x.shape[0] * rows].view(x.shape[0], rows)
    native.linear(x, *library_arguments(packed), bias, *nm(packed), out, threads)
    assert torch.isnan(whole[:16]).all(), "wrote in front of the output"
    assert torch.isnan(whole[16 + out.numel() :]).all(), "wrote behind the output"
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_product_of_few_rows(pattern: str, shape: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(0)
    packed = pack(pattern, shape, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11):
        x = torch.randn(m, shape[1]).to(dtype)
        with_bias = bias if m % 2 else None
        assert_close(native_product(x, packed, with_bias, 2), expected(x, packed, with_bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        ("2:4", (1, 4)),
        ("2:4", (29, 100)),
        ("2:4", (200, 192)),
        ("1:2", (7, 66)),
        ("4:8", (13, 1048)),
        ("0.5", (31, 7)),
        ("0.9", (200, 129)),
    ],
    ids=str,
)
def test_product_of_many_rows(pattern: str, shape: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    """Blocks of 16 and 32 activation rows, steps of 12, 4 and 1 weight rows, tiles and panels that are full and not."""
    torch.manual_seed(0)
    packed = pack(pattern, shape, dtype)
    bias = torch.randn(shape[0]).to(dtype)
    for m in (9, 16, 17, 31, 32, 33, 49):
        x = torch.randn(m, shape[1]).to(dtype)
        with_bias = bias if m % 2 else None
        assert_close(native_product(x, packed, with_bias, 2), expected(x, packed, with_bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "shape", "m"),
    [("2:4", (401, 132), 161), ("2:4", (13, 2308), 33), ("0.5", (413, 75), 161), ("4:8", (25, 4104), 131), ("0.6", (27, 2500), 40)],
    ids=str,
)
def test_product_of_several_panels_and_passes(pattern: str, shape: tuple[int, int], m: int, dtype: torch.dtype, level: str) -> None:
    """More weight rows than a panel, columns than a tile, and activation rows than a pass has."""
    torch.manual_seed(0)
    packed = pack(pattern, shape, dtype)
    x, bias = torch.randn(m, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    assert_close(native_product(x, packed, bias, 2), expected(x, packed, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 31), (6, 33), (9, 129), (130, 1001), (8, 2048)], ids=str)
def test_dense_product(shape: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    for m in (1, 2, 3, 5, 8, 9):
        x = torch.randn(m, shape[1]).to(dtype)
        out = torch.full((m, shape[0]), float("nan"), dtype=dtype)
        native.dense_linear(x, weight, bias, out, 2)
        assert_close(out, x.double() @ weight.double().T + bias.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "shape"), [("2:4", (65, 256)), ("3:32", (33, 96)), ("0.5", (64, 515)), ("0.9", (7, 63))], ids=str)
def test_layer_over_numbers_of_rows(pattern: str, shape: tuple[int, int], dtype: torch.dtype, level: str, threads: int) -> None:
    torch.manual_seed(0)
    packed = pack(pattern, shape, dtype)
    for bias in (None, torch.randn(shape[0]).to(dtype)):
        layer = SparseLinear.from_packed(packed, bias, backend="cpu")
        for m in ROWS:
            x = torch.randn(m, shape[1]).to(dtype)
            assert_close(layer(x), expected(x, packed, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_any_shape_and_stride(dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(0)
    packed = pack("2:4", (24, 96), dtype)
    layer = SparseLinear.from_packed(packed, torch.randn(24).to(dtype), backend="cpu")
    bias = layer.bias.detach()
    for x in (
        torch.randn(96),
        torch.randn(2, 3, 96),
        torch.randn(2, 1, 5, 96),
        torch.randn(96, 3).t(),
        torch.randn(5, 192)[:, ::2],
        torch.randn(1, 96).expand(40, 96),
        torch.randn(4, 0, 96),
    ):
        x = x.to(dtype)
        assert_close(layer(x), expected(x, packed, bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_unusual_masks(rows: int, dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(0)
    shape = (37, 301)
    sparse = torch.rand(shape) < 0.3
    sparse[[0, 5, 36]] = False
    sparse[[7, 20]] = True
    one_at_the_end = torch.zeros(shape, dtype=torch.bool)
    one_at_the_end[-1, -1] = True
    for keep in (sparse, torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool), one_at_the_end):
        packed = pack(SparsityPattern.unstructured(0.5), shape, dtype, keep)
        x = torch.randn(rows, shape[1]).to(dtype)
        assert_close(SparseLinear.from_packed(packed, backend="cpu")(x), expected(x, packed), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_extremes(dtype: torch.dtype, level: str) -> None:
    """Kept slots that hold 0.0 add nothing, and the widest finite values and subnormals come through exactly."""
    info = torch.finfo(dtype)
    keep = torch.tensor([[True, True, False, False] * 4])
    weight = torch.zeros(1, 16, dtype=dtype)
    weight[0, 0], weight[0, 5] = info.max, info.tiny
    packed = formats.get("nm").pack(weight, Mask(SparsityPattern.nm(2, 4), keep))
    for column, wanted in ((0, info.max), (5, info.tiny), (1, 0.0), (2, 0.0)):
        x = torch.zeros(1, 16, dtype=dtype)
        x[0, column] = 1
        assert float(native_product(x, packed, None, 1)) == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 8, 40])
def test_subnormals(m: int, dtype: torch.dtype, level: str) -> None:
    """Weights and activations below the normal range: fp16 ones count in full, others may be taken for zero, and no sum goes astray."""
    torch.manual_seed(0)
    info = torch.finfo(dtype)
    packed = pack("2:4", (30, 64), dtype)
    packed.tensors["values"].mul_(info.tiny / 8)
    for x in (torch.randn(m, 64).to(dtype), (torch.randn(m, 64) * info.tiny / 8).to(dtype)):
        got, wanted = native_product(x, packed, None, 2).double(), expected(x, packed)
        slack = info.tiny * info.eps if dtype is torch.float16 else 64 * 4 * info.tiny
        assert float((got - wanted).abs().max()) <= slack


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("m", [1, 8, 40])
def test_very_long_rows(pattern: str, m: int, level: str) -> None:
    torch.manual_seed(0)
    packed = pack(pattern, (2, 1 << 17), torch.bfloat16)
    x = torch.randn(m, 1 << 17).to(torch.bfloat16)
    assert_close(native_product(x, packed, None, 2), expected(x, packed), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_unaligned_arrays_and_any_number_of_threads(pattern: str, dtype: torch.dtype, level: str) -> None:
    """Every array begins at an odd address but for its elements' own alignment, which torch cannot go below."""
    torch.manual_seed(0)
    packed = pack(pattern, (130, 200), dtype)

    def moved(tensor: Tensor) -> Tensor:
        place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        return place.copy_(tensor)

    arguments = [None if tensor is None else moved(tensor) for tensor in library_arguments(packed)]
    bias = moved(torch.randn(130).to(dtype))
    for m in (1, 5, 20, 45):
        x, wanted = moved(torch.randn(m, 200).to(dtype)), None
        for threads in (1, 2, 3, 8, 17):
            out = moved(torch.full((m, 130), float("nan"), dtype=dtype))
            native.linear(x, *arguments, bias, *nm(packed), out, threads)
            wanted = expected(x, packed, bias) if wanted is None else wanted
            assert_close(out, wanted, dtype)


def test_sum_overflows_to_infinity(level: str) -> None:
    packed = pack("2:4", (1, 8), torch.float16)
    packed.tensors["values"].fill_(60000)
    x = torch.ones(1, 8, dtype=torch.float16)
    assert float(native_product(x, packed, None, 1)) == float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_expanded_tiles_are_exact(pattern: str, shape: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(0)
    packed = pack(pattern, shape, dtype)
    dense = unpacked(packed)
    for begin, end in {(0, shape[0]), (0, 0), (shape[0] // 2, shape[0]), (shape[0] // 3, shape[0] // 2)}:
        for out_dtype in {dtype, torch.float32}:
            whole = torch.full(((end - begin) * shape[1] + 32,), float("nan"), dtype=out_dtype)
            out = whole[16 : whole.numel() - 16].view(end - begin, shape[1])
            native.expand_tile(*library_arguments(packed), *nm(packed), shape[1], begin, end, out, 2)
            assert torch.equal(out, dense[begin:end].to(out_dtype))
            assert torch.isnan(whole[:16]).all()
            assert torch.isnan(whole[-16:]).all()


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("pattern", "shape"),
    [(p, s) for p, s in CASES if s[0] * s[1] <= 40_000 and p in ("2:4", "3:32", "7:8", "0.5", "0.9")],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_nothing_behind_the_tensors_is_read(pattern: str, shape: tuple[int, int], dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(0)
    fence = Fenced()
    try:
        packed = pack(pattern, shape, dtype)
        placed = {name: fence.place(tensor) for name, tensor in packed.tensors.items()}
        tensors = (placed["values"], None, placed["bitmask"], placed.get("row_offsets"))
        bias = fence.place(torch.randn(shape[0]).to(dtype))
        dense = fence.place(unpacked(packed))
        for m in (1, 3, 8, 18):
            x = fence.place(torch.randn(m, shape[1]).to(dtype))
            out = fence.place(torch.full((m, shape[0]), float("nan"), dtype=dtype))
            native.linear(x, *tensors, bias, *nm(packed), out, 2)
            assert_close(out, expected(x, packed, bias), dtype)
            native.dense_linear(x, dense, bias, out.fill_(float("nan")), 2)
            assert_close(out, expected(x, packed, bias), dtype)
        for out_dtype in {dtype, torch.float32}:
            tile = fence.place(torch.full(shape, float("nan"), dtype=out_dtype))
            native.expand_tile(*tensors, *nm(packed), shape[1], 0, shape[0], tile, 2)
            assert torch.equal(tile, unpacked(packed).to(out_dtype))
    finally:
        fence.open()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 33])
def test_gradients_of_activations_and_bias(rows: int, dtype: torch.dtype, level: str) -> None:
    torch.manual_seed(0)
    packed = pack("2:4", (40, 96), dtype)
    layer = SparseLinear.from_packed(packed, torch.randn(40).to(dtype), backend="cpu")
    layer.bias.requires_grad_(True)
    x = torch.randn(2, rows, 96).to(dtype).requires_grad_(True)
    gradient = torch.randn(2, rows, 40).to(dtype)
    layer(x).backward(gradient)
    assert_close(x.grad, gradient.double() @ unpacked(packed).double(), dtype)
    assert_close(layer.bias.grad, gradient.double().sum((0, 1)), dtype)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_operator_contract(kernel: str, pattern: str, rows: int) -> None:
    registry.get(kernel)  # which defines its operator
    packed = pack(pattern, (16, 64), torch.float32)
    tensors, shape = packed.tensors, packed.pattern
    arguments = (
        torch.randn(rows, 64),
        tensors["values"],
        tensors["bitmask"],
        tensors.get("row_offsets"),
        None,
        torch.randn(16),
        shape.n or 0,
        shape.m or 0,
    )
    torch.library.opcheck(getattr(torch.ops.sparse_engine, f"{kernel}_linear").default, arguments)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_compiles_into_one_graph(pattern: str) -> None:
    packed = pack(pattern, (16, 64), torch.float32)
    layer = SparseLinear.from_packed(packed, torch.randn(16), backend="cpu")
    layer.plan()
    compiled = torch.compile(lambda x: torch.relu(layer(x)) + 1, fullgraph=True, backend="aot_eager")
    for rows in (1, 5, 64):
        x = torch.randn(rows, 64)
        with torch.no_grad():
            assert_close(compiled(x), torch.relu(expected(x, packed, layer.bias)) + 1, torch.float32)


def test_transformed_and_watched_calls_go_through_the_operator() -> None:
    """The eager shortcut must not hide the product from vmap or from a dispatch mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    packed = pack("2:4", (16, 64), torch.float32)
    layer = SparseLinear.from_packed(packed, backend="cpu")
    x = torch.randn(3, 64)
    with Seen(), torch.no_grad():
        layer(x)
    assert names == ["sparse_engine.cpu_linear.default"]
    assert_close(torch.func.vmap(layer)(x), expected(x, packed), torch.float32)


def test_registry_prefers_the_native_kernel() -> None:
    packed = pack("4:8", (64, 64), torch.bfloat16)
    for rows in registry.ROW_BUCKETS:
        assert registry.select(registry.Problem.of(packed, rows)).name == "cpu"


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.randn(1, 64), None, "convert them to one type"),
        (torch.randn(1, 64, dtype=torch.bfloat16), torch.randn(16), "convert them to one type"),
        (torch.randn(1, 72, dtype=torch.bfloat16), None, "x has 72 columns"),
        (torch.randn(1, 60, dtype=torch.bfloat16), None, "x has 60 columns"),
        (torch.randn(1, 64, dtype=torch.bfloat16), torch.randn(15, dtype=torch.bfloat16), "expected \\(16,\\)"),
    ],
)
def test_mismatched_arguments_are_named(x: Tensor, bias: Tensor | None, message: str) -> None:
    packed = pack("2:4", (16, 64), torch.bfloat16)
    with pytest.raises(InputError, match=message):
        registry.get("cpu").run(x, packed.tensors, bias, packed.pattern)
