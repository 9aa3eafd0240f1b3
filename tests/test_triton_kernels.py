"""The Triton kernels: products under Triton's interpreter (on any machine) or on a GPU, and how the package holds them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparse_engine import formats, registry
from sparse_engine.backends import triton_bitmask
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Odd numbers of rows; columns that end inside a mask byte, and below, at and behind the columns of a step.
SHAPES = {
    "2:4": [(1, 4), (13, 260), (5, 1028)],
    "4:8": [(7, 264), (3, 1032)],
    "1:4": [(9, 300)],
    "3:16": [(6, 272), (1, 16)],
    "16:32": [(5, 544)],
    "0.5": [(11, 263), (1, 3), (3, 1031)],
    "0.9": [(6, 513)],
}
CASES = [(pattern, shape) for pattern, shapes in SHAPES.items() for shape in shapes]


def _import_kernel() -> tuple[ModuleType | None, str]:
    """kernels/bitmask.py as installed, interpreted where there is no GPU; or why it cannot be had."""
    if reason := triton_bitmask._why_unavailable():
        return None, f"the Triton kernel {reason}"
    if DEVICE == "cuda":
        return importlib.import_module("sparse_engine.kernels.bitmask"), ""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "something imported triton before this module could choose its interpreter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("sparse_engine.kernels.bitmask"), ""


BITMASK, WHY_NOT = _import_kernel()


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> Iterator[None]:
    # Triton reads the variable both when a function is decorated and at its first calls; other modules' tests must not see it.
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


needs_kernel = pytest.mark.skipif(BITMASK is None, reason=WHY_NOT)


def make_packed(pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: str = DEVICE) -> PackedWeight:
    """A random weight; an unstructured one has an empty row, at the end too, and a full one."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    parsed = SparsityPattern.parse(pattern)
    weight = torch.randn(shape, generator=generator)
    if parsed.is_nm:
        n, m = parsed.group
        order = torch.rand(shape[0], shape[1] // m, m, generator=generator).argsort(-1)
        keep = torch.zeros(order.shape, dtype=torch.bool).scatter_(2, order[..., :n], True).view(shape)
    else:
        keep = torch.rand(shape, generator=generator) >= (parsed.sparsity or 0)
        keep[shape[0] // 3] = True
        if shape[0] > 2:
            keep[[0, shape[0] // 2, -1]] = False
    return formats.for_pattern(parsed).pack(weight.to(dtype), Mask(parsed, keep)).to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def expected_product(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    product = x.double() @ formats.get(packed.format).unpack(packed).double().T
    return product if bias is None else product + bias.double()


def operator_arguments(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> tuple[object, ...]:
    tensors = packed.tensors
    return x, tensors["values"], tensors["bitmask"], tensors.get("row_offsets"), bias, packed.pattern.n or 0, packed.pattern.m or 0


def launch(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """The kernel's result in memory full of NaN, with what lies around it checked to be left alone."""
    assert BITMASK is not None
    size = x.shape[0] * packed.shape[0]
    memory = torch.full((size + 64,), float("nan"), dtype=x.dtype, device=x.device)
    out = memory[32 : 32 + size].view(x.shape[0], packed.shape[0])
    assert BITMASK.bitmask_linear(*operator_arguments(x, packed, bias), out) is out
    assert bool(memory[:32].isnan().all())
    assert bool(memory[32 + size :].isnan().all())
    return out


def assert_product(pattern: str, shape: tuple[int, int], m: int, dtype: torch.dtype, *, with_bias: bool) -> None:
    packed = make_packed(pattern, shape, dtype)
    x = torch.randn(m, shape[1], device=DEVICE, dtype=dtype)
    bias = torch.randn(shape[0], device=DEVICE, dtype=dtype) if with_bias else None
    y = launch(x, packed, bias)
    assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[dtype]


@needs_kernel
@pytest.mark.parametrize(("m", "with_bias"), [(1, False), (1, True), (3, True), (7, False), (16, False), (16, True)])
@pytest.mark.parametrize(("pattern", "shape"), CASES)
def test_product_matches_fp64(pattern: str, shape: tuple[int, int], m: int, with_bias: bool) -> None:
    assert_product(pattern, shape, m, torch.float32, with_bias=with_bias)


@needs_kernel
@pytest.mark.parametrize("pattern", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_match_fp64(pattern: str, dtype: torch.dtype) -> None:
    for m in (1, 7):
        assert_product(pattern, SHAPES[pattern][0], m, dtype, with_bias=True)


@needs_kernel
def test_weight_without_any_value_gives_the_bias() -> None:
    pattern = SparsityPattern.unstructured(0.9)
    shape = (5, 19)
    packed = formats.for_pattern(pattern).pack(torch.ones(shape), Mask(pattern, torch.zeros(shape, dtype=torch.bool))).to(DEVICE)
    bias = torch.randn(5, device=DEVICE)
    assert torch.equal(launch(torch.randn(2, 19, device=DEVICE), packed, bias), bias.expand(2, 5))


@needs_kernel
def test_rows_of_x_may_lie_apart() -> None:
    packed = make_packed("2:4", (6, 36), torch.float32)
    x = torch.randn(3, 50, device=DEVICE)[:, 7:43]
    assert relative_error(launch(x, packed, None), expected_product(x, packed, None)) < TOLERANCE[torch.float32]


@needs_kernel
def test_kernel_and_backend_agree_on_the_most_rows() -> None:
    assert BITMASK is not None
    assert BITMASK.MAX_ROWS == triton_bitmask._MAX_ROWS
    for m in range(1, BITMASK.MAX_ROWS + 1):
        assert 1 << (m - 1).bit_length() in BITMASK._BLOCKS


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparse_engine.kernels import bitmask

names = [parameter.name for parameter in bitmask._bitmask_linear.params]
for element, offsets, padded in (("bf16", False, 16), ("fp32", True, 1)):
    rows, size, warps = bitmask._BLOCKS[padded]
    pointers = {"x": "*" + element, "values": "*" + element, "bitmask": "*u8", "bias": "*" + element, "y": "*" + element}
    constants = {"ROWS_PADDED": padded, "BLOCK_ROWS": rows, "BLOCK_BYTES": size}
    if offsets:
        pointers["row_offsets"] = "*i64"
    else:
        constants["row_offsets"] = None
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    source = ASTSource(bitmask._bitmask_linear, signature, constants)
    compiled = triton.compile(source, GPUTarget("cuda", CAPABILITY, 32), {"num_warps": warps})
    print("compiled", len(compiled.asm["cubin"]) > 0)
"""


@needs_kernel
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    # In a process of its own, since here Triton may be interpreting; without a GPU this is where what the interpreter lets pass shows.
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE.replace("CAPABILITY", str(capability))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["compiled", "True"] * 2


def problem(rows: int, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Problem:
    parsed = SparsityPattern.parse(pattern)
    return Problem(formats.for_pattern(parsed).name, parsed, dtype, device, 4096, 4096, rows, (9, 0) if device == "cuda" else None)


def test_rejections_say_why() -> None:
    kernel = registry.get("triton_bitmask")
    assert kernel.rejects(problem(17)) == "takes at most 16 activation rows, not 17"
    assert kernel.rejects(problem(1, device="cpu")) == "runs on cuda, not cpu"
    if BITMASK is not None:
        for pattern in SHAPES:
            for dtype in TOLERANCE:
                assert kernel.rejects(problem(16, pattern, dtype)) is None


@pytest.mark.parametrize(
    ("missing", "message"), [("triton", "needs triton, which is not installed"), ("sparse_engine.kernels", "only an installed")]
)
def test_missing_modules_are_a_reason(missing: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        if name.startswith(missing):
            if name != missing:
                raise ModuleNotFoundError(missing)
            return None
        return object()

    monkeypatch.setattr(triton_bitmask, "find_spec", find)
    for cached in (triton_bitmask._why_unavailable, triton_bitmask._launcher):
        cached.cache_clear()
    try:
        reason = registry.get("triton_bitmask").rejects(problem(1))
        assert reason is not None
        assert message in reason
        with pytest.raises(KernelUnavailableError, match=message):
            triton_bitmask._launcher()
    finally:
        for cached in (triton_bitmask._why_unavailable, triton_bitmask._launcher):
            cached.cache_clear()


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (16384, 4096), (36864, 9216)], ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_measured_kernels_go_first_and_the_reference_last(shape: tuple[int, int], rows: int) -> None:
    for pattern, faster in (("2:4", "cuda_nm"), ("4:8", "cuda_nm"), ("0.5", "cuda_unstructured")):
        parsed = SparsityPattern.parse(pattern)
        case = Problem(formats.for_pattern(parsed).name, parsed, torch.bfloat16, "cuda", *shape, rows, (9, 0))
        costs = [registry.get(name).cost(case) for name in (faster, "triton_bitmask", "reference")]
        assert costs == sorted(costs)


def test_wrong_arguments_are_refused() -> None:
    packed = make_packed("2:4", (4, 16), torch.float32, "cpu")
    for x, bias, message in (
        (torch.zeros(1, 16, dtype=torch.float16), None, "convert them to one type"),
        (torch.zeros(1, 12), None, "x has 12 columns"),
        (torch.zeros(1, 16), torch.zeros(5), "the bias has shape"),
        (torch.zeros(17, 16), None, "at most 16 activation rows, got 17"),
        (torch.zeros(1, 16, device="meta"), None, "move them to one device"),
    ):
        with pytest.raises(InputError, match=message):
            triton_bitmask._linear(*operator_arguments(x, packed, bias))


def test_finding_backends_imports_no_kernel() -> None:
    code = (
        "import sys; from sparse_engine import registry; registry.all_kernels(); print([m for m in sys.modules if 'engine.kernels' in m])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_kernels_is_no_package_of_its_own() -> None:
    # transformers looks for a PyPI package called `kernels`; a folder of that name with an __init__.py would be taken for it.
    assert not (Path(__file__).parents[1] / "kernels" / "__init__.py").exists()
    try:
        installed = metadata.files("sparse-engine") or []
    except metadata.PackageNotFoundError:
        pytest.skip("sparse-engine is not installed")
    assert not [path for path in installed if path.parts[0] == "kernels" or path.parts[-2:] == ("kernels", "__init__.py")]


@needs_kernel
def test_kernels_lie_inside_the_package() -> None:
    inside = find_spec("sparse_engine.kernels")
    assert inside is not None
    # A namespace package: no file of its own.
    assert inside.origin is None
    # An editable install puts the checkout on the path, where the folder is a namespace portion: a real package of that name
    # still wins over it, and nothing of ours can be imported as one.
    code = "from importlib.util import find_spec; s = find_spec('kernels'); print(s.origin if s else None)"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    origin = result.stdout.strip()
    assert origin == "None" or not (Path(origin).parent / "bitmask.py").exists()


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("pattern", "shape"), [*CASES, ("2:4", (770, 776)), ("0.7", (1100, 2049))])
def test_registered_kernel_matches_fp64(pattern: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = make_packed(pattern, shape, dtype)
    bias = torch.randn(shape[0], device="cuda", dtype=dtype)
    wide = torch.randn(2, 8, 2 * shape[1], device="cuda", dtype=dtype)
    for x in (wide[0, :1, : shape[1]], wide[:, :3, 1 : shape[1] + 1], wide[..., ::2]):
        y = registry.get("triton_bitmask").run(x, packed.tensors, bias, packed.pattern)
        assert y.shape == (*x.shape[:-1], shape[0])
        assert relative_error(y, expected_product(x, packed, bias)) < TOLERANCE[dtype]


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_cuda_graph(pattern: str) -> None:
    packed = make_packed(pattern, (64, 512), torch.bfloat16)
    kernel = registry.get("triton_bitmask")
    x = torch.randn(2, 512, device="cuda", dtype=torch.bfloat16)
    # Compiled before the capture, in which nothing may be loaded.
    kernel.run(x, packed.tensors, None, packed.pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.run(x, packed.tensors, None, packed.pattern)
    for _ in range(2):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert relative_error(y, expected_product(x, packed, None)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_operator_registration(pattern: str) -> None:
    packed = make_packed(pattern, (32, 64), torch.bfloat16)
    x = torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.sparse_engine.triton_bitmask_linear.default, operator_arguments(x, packed, None))
