"""What the tests of the CUDA kernels share: the GPUs they reason about, packed weights with awkward entries, and the compiler."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from products import random_keep

from sparse_engine import cuda, formats, registry
from sparse_engine.backends import cuda_decode
from sparse_engine.bench.shapes import PATTERNS
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

H200 = cuda_decode.Gpu("NVIDIA H200", "sm_90a", 132, True, 232448)
A100 = cuda_decode.Gpu("NVIDIA A100-SXM4-80GB", "sm_80", 108, False, 166912)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
KERNEL_OF = {"2:4": "cuda_nm", "4:8": "cuda_nm", "0.5": "cuda_unstructured", "0.7": "cuda_unstructured"}


def make_packed(pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> PackedWeight:
    """A random weight with awkward entries: a zero row, -0.0 and kept zeros."""
    generator = torch.Generator().manual_seed(seed)
    parsed = SparsityPattern.parse(pattern)
    weight = torch.randn(shape, generator=generator)
    if parsed.is_nm:
        keep = random_keep(shape, parsed, generator)
    else:
        keep = torch.rand(shape, generator=generator) >= (parsed.sparsity or 0)
        # A dense block beside an empty one, so that lanes of a tile have streams of very different lengths.
        keep[: shape[0] // 3, : shape[1] // 2] = True
        keep[: shape[0] // 3, shape[1] // 2 :] = False
    weight[shape[0] // 2] = 0.0
    weight[torch.rand(shape, generator=generator) < 0.05] = -0.0
    return formats.for_pattern(parsed).pack(weight.to(dtype), Mask(parsed, keep)).to(device)


def problem_of(pattern: str, shape: tuple[int, int], m: int) -> registry.Problem:
    """The product of m activation rows by a bf16 weight with ``pattern`` "2:4", "4:8" or "unstructured", for a GPU that is not here."""
    parsed = SparsityPattern.parse(PATTERNS[pattern])
    fmt = formats.for_pattern(parsed)
    return registry.Problem.of(PackedWeight(fmt.name, fmt.version, parsed, shape, torch.bfloat16, {}), m, torch.device("cpu"))


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """The library of the package nvidia-cuda-nvrtc, or of a toolkit, if there is one."""
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package is not None else ():
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    found = ctypes.util.find_library("nvrtc")
    return ctypes.CDLL(found) if found is not None else None


def assert_nvrtc_compiles(arch: str, file: str, macros: Mapping[str, int]) -> None:
    """Where there is NVRTC: it is what compiles on users' machines, and takes less than nvcc does (no host functions, for one)."""
    if (library := _nvrtc()) is None:
        return
    source = cuda.source_folder() / file
    options = [f"--gpu-architecture=sm_{arch}", "--std=c++17", f"-I{source.parent / 'include'}", *(f"-D{k}={v}" for k, v in macros.items())]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), file.encode(), 0, None, None) == 0
    try:
        given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        failed = library.nvrtcCompileProgram(program, len(options), given)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()


def nvcc(arch: str, file: str, macros: Mapping[str, int], folder: Path) -> str:
    """What the assembler says of a source's registers, which NVRTC must take as well where there is one; skips without a compiler."""
    if (found := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc on the PATH; the kernels are compiled by NVRTC where a GPU is")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    source = cuda.source_folder() / file
    options = ["-std=c++17", "-cubin", "-Xptxas", "-v", "-I", str(source.parent / "include"), "-o", str(folder / "out.cubin")]
    command = [found, target, *options, str(source)]
    result = subprocess.run([*command, *(f"-D{k}={v}" for k, v in macros.items())], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert_nvrtc_compiles(arch, file, macros)
    return result.stderr
