"""How the package holds the Triton kernels: the backend that the registry sees, what it refuses, and where the modules lie."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_products import (
    BITMASK,
    SHAPES,
    TOLERANCE,
    interpreter,  # noqa: F401  a fixture of every test here
    make_packed,
    needs_kernel,
    packed_arguments,
)

from sparse_engine import formats, registry, tuning
from sparse_engine.backends import triton_bitmask
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Problem


def problem(rows: int, pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Problem:
    parsed = SparsityPattern.parse(pattern)
    return Problem(formats.for_pattern(parsed).name, parsed, dtype, device, 4096, 4096, rows, (9, 0) if device == "cuda" else None)


def test_rejections_say_why() -> None:
    kernel = registry.get("triton_bitmask")
    assert kernel.rejects(problem(1, device="cpu")) == "runs on cuda, not cpu"
    if BITMASK is not None:
        # Every bucket of rows, so that the backend can be forced for a whole model.
        for rows in registry.ROW_BUCKETS:
            for pattern in SHAPES:
                for dtype in TOLERANCE:
                    assert kernel.rejects(problem(rows, pattern, dtype)) is None


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
    for cached in (triton_bitmask._why_unavailable, triton_bitmask._kernels):
        cached.cache_clear()
    try:
        reason = registry.get("triton_bitmask").rejects(problem(1))
        assert reason is not None
        assert message in reason
        with pytest.raises(KernelUnavailableError, match=message):
            triton_bitmask._kernels()
    finally:
        for cached in (triton_bitmask._why_unavailable, triton_bitmask._kernels):
            cached.cache_clear()


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (16384, 4096), (36864, 9216)], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 128, 4096])
def test_measured_kernels_go_first_and_the_reference_last(shape: tuple[int, int], rows: int) -> None:
    for pattern, faster in (("2:4", "cuda_nm"), ("4:8", "cuda_nm"), ("0.5", "cuda_unstructured")):
        parsed = SparsityPattern.parse(pattern)
        case = Problem(formats.for_pattern(parsed).name, parsed, torch.bfloat16, "cuda", *shape, rows, (9, 0))
        costs = [registry.get(name).cost(case) for name in (faster, "triton_bitmask", "reference")]
        assert costs == sorted(costs)


def test_wrong_arguments_are_refused() -> None:
    for pattern, x, bias, message in (
        ("2:4", torch.zeros(1, 16, dtype=torch.float16), None, "convert them to one type"),
        ("2:4", torch.zeros(1, 12), None, "x has 12 columns"),
        ("2:4", torch.zeros(1, 16), torch.zeros(5), "the bias has shape"),
        ("2:4", torch.zeros(1, 16, device="meta"), None, "move them to one device"),
    ):
        packed = make_packed(pattern, (4, 16), torch.float32, "cpu")
        with pytest.raises(InputError, match=message):
            triton_bitmask._linear(*packed_arguments(x, packed, bias), "", [])
    packed = make_packed("0.5", (4, 16), torch.float32, "cpu")
    arguments = list(packed_arguments(torch.zeros(1, 16), packed, None))
    arguments[4] = torch.zeros(4, 2, dtype=torch.int32)
    with pytest.raises(InputError, match=r"chunk_starts has shape \(4, 2\), expected \(4, 1\)"):
        triton_bitmask._linear(*arguments, "", [])


@needs_kernel
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("gemm", 1, 4, 32, 1, 1, 4), "a form of gemv or dot"),
        (("gemv", 1, 4, 32), "it is not \\(form, block_m, block_rows, block_bytes, depth, parts, warps\\)"),
        (("dot", 16, 64, 8, 0, 1, 4), "sizes above 0"),
        (("dot", 16, 64, 8, 3, 17, 4), "at most 16 parts, not 17"),
        (("dot", 16, 48, 8, 3, 1, 4), "block_rows is 48, which is no power of two"),
        (("gemv", 1, 2, 32, 1, 1, 4), "4 warps on 32 bytes a step cover 4 rows, not 1 to block_rows = 2"),
        (("gemv", 1, 2, 256, 1, 1, 4), "cover 0 rows"),
        (("dot", 8, 64, 8, 3, 1, 4), "at least 16 activation rows"),
    ],
    ids=str,
)
def test_configurations_that_cannot_run_are_refused(config: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        triton_bitmask._tile(config[0], config[1:])


@needs_kernel
def test_tile_too_large_for_the_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BITMASK is not None

    def refuse(*_: object) -> None:
        raise BITMASK.OutOfResources(81920, 65536, "shared memory")

    monkeypatch.setattr(BITMASK, "bitmask_linear", refuse)
    tile = BITMASK.Tile("dot", 128, 128, 8, 3, 1, 8)
    with pytest.raises(KernelUnavailableError, match=r"cannot run \['dot', 128, 128, 8, 3, 1, 8\] on this GPU: .*Required: 81920"):
        triton_bitmask._launch(BITMASK, tile, None)


@needs_kernel
def test_measured_configuration_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BITMASK is not None
    monkeypatch.setenv("SPARSE_ENGINE_CACHE", str(tmp_path))
    gpu, shape = "A GPU that is nowhere", (768, 768)
    measured = {1: ("gemv", 1, 4, 32, 4, 2, 4), 64: (), 128: ("dot", 1.5)}
    entries = [
        tuning.Entry("2:4", torch.bfloat16, shape, rows, {"triton_bitmask": tuning.Measured(1.0, config)})
        for rows, config in measured.items()
    ]
    tuning.record(gpu, entries)
    assert triton_bitmask._choose(gpu, "2:4", torch.bfloat16, shape, 1) == BITMASK.Tile("gemv", 1, 4, 32, 4, 2, 4)
    for rows in (5, 64):
        default = BITMASK.default_tile(rows, *shape, torch.bfloat16)
        assert triton_bitmask._choose(gpu, "2:4", torch.bfloat16, shape, rows) == default
    with pytest.raises(InputError, match=r"gives triton_bitmask \['dot', 1.5\], not a form and whole sizes"):
        triton_bitmask._choose(gpu, "2:4", torch.bfloat16, shape, 128)


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_layout_is_as_large_as_foretold(pattern: str) -> None:
    packed = make_packed(pattern, (7, 1032), torch.float32, "cpu")
    kernel = registry.get("triton_bitmask")
    layout = kernel.prepare(packed)
    assert kernel.layout_nbytes(Problem.of(packed, 1), packed) == sum(t.nbytes for t in layout.values())


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows_give_no_rows(shape: tuple[int, ...]) -> None:
    packed = make_packed("2:4", (4, 16), torch.float32, "cpu")
    y = triton_bitmask._linear(*packed_arguments(torch.zeros(shape), packed, None), "", [])
    assert y.shape == (*shape[:-1], 4)


def test_finding_backends_imports_no_kernel() -> None:
    code = (
        "import sys; from sparse_engine import registry; registry.all_kernels(); print([m for m in sys.modules if 'engine.kernels' in m])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_kernels_is_no_package_of_its_own() -> None:
    # transformers looks for a PyPI package called `kernels`; a folder of that name with an __init__.py would be taken for it.
    assert not (Path(__file__).parents[2] / "kernels" / "__init__.py").exists()
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
