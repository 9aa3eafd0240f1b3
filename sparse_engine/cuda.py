"""Compiles the CUDA sources for the GPU at hand and launches them, with no CUDA toolkit on the machine.

NVRTC (through ``cuda.core``) compiles a source once per set of macros; the cubin is kept on disk under
``$SPARSE_ENGINE_CACHE`` or ``$XDG_CACHE_HOME/sparse-engine`` (default ``~/.cache/sparse-engine``), named by a hash of
everything it depends on. Launches go straight to the driver, on torch's current stream.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from sparse_engine.errors import KernelUnavailableError

__all__ = [
    "CudaFunction",
    "TensorMap",
    "cache_folder",
    "compile_cubin",
    "describable",
    "is_compiled",
    "launch",
    "load",
    "source_folder",
    "tensor_map",
    "why_unavailable",
]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ATTRIBUTE_COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
_ATTRIBUTE_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_ATTRIBUTE_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_TENSOR_MAP_KINDS = {torch.uint8: 0, torch.int8: 0, torch.float8_e4m3fn: 0, torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_INTERLEAVE_NONE, _PROMOTE_L2_256B, _FILL_ZEROS = 0, 3, 0  # CUtensorMapInterleave, -L2promotion, -FloatOOBfill
_SWIZZLE = {64: 2, 128: 3}  # CUtensorMapSwizzle, by the bytes of a box's row


def source_folder() -> Path:
    """The folder of the .cu files, and of their headers in ``include``: inside an installed package, else in the repository."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc" / "cuda", here.parent / "csrc" / "cuda"):
        if folder.is_dir():
            return folder
    raise KernelUnavailableError(f"the CUDA sources are missing from this installation (looked beside {here}); reinstall sparse-engine")


@cache
def why_unavailable() -> str | None:
    """Why CUDA sources cannot be compiled here (a phrase that can follow a kernel's name), or None when they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device and torch sees none"
    try:
        import cuda.core  # noqa: F401
    except ImportError as error:
        return f"compiles with NVRTC through the package cuda-core, which cannot be imported ({error}); pip install 'sparse-engine[gpu]'"
    return None


def cache_folder() -> Path:
    """Where compiled kernels and tuning tables are kept on this machine."""
    if folder := os.environ.get("SPARSE_ENGINE_CACHE"):
        return Path(folder) / "cuda"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparse-engine" / "cuda"


def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _files_of(source: str) -> list[Path]:
    """csrc/cuda/``source`` and every header that it may include."""
    folder = source_folder()
    return [folder / source, *sorted((folder / "include").rglob("*.cuh"))]


@cache
def _digest_of(folder: Path, source: str) -> str:
    """Of ``source`` and its headers, read once: no process compiles what was changed while it runs."""
    digest = hashlib.sha256()
    for path in _files_of(source):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _defines(macros: Mapping[str, int]) -> list[str]:
    return [f"{name}={value}" for name, value in sorted(macros.items())]


def _target(source: str, arch: str, macros: Mapping[str, int]) -> Path:
    """Where the machine code is kept."""
    what = repr((_digest_of(source_folder(), source), arch, _nvrtc_version(), _defines(macros)))
    return cache_folder() / f"{Path(source).stem}-{arch}-{hashlib.sha256(what.encode()).hexdigest()[:32]}.cubin"


def is_compiled(source: str, arch: str, macros: Mapping[str, int]) -> bool:
    """Whether :func:`compile_cubin` would find its result in the disk cache."""
    try:
        return _target(source, arch, macros).is_file()
    except Exception:  # without NVRTC, as in compile_cubin, which says what is wrong
        return False


def compile_cubin(source: str, arch: str, macros: Mapping[str, int]) -> bytes:
    """Machine code for csrc/cuda/``source`` with ``macros`` defined, for an ``arch`` such as "sm_90a"; from the disk cache if it is there.

    Raises:
        KernelUnavailableError: NVRTC is missing or rejects the source.
    """
    folder = source_folder()
    try:
        from cuda.core import Program, ProgramOptions

        target = _target(source, arch, macros)
        if target.is_file():
            return target.read_bytes()
        options = ProgramOptions(arch=arch, std="c++17", include_path=str(folder / "include"), define_macro=_defines(macros) or None)
        cubin = bytes(Program((folder / source).read_text(), "c++", options).compile("cubin").code)
    except Exception as error:  # NVRTC, a missing library and a driver too old for it all raise types of their own
        raise KernelUnavailableError(f"NVRTC cannot compile {source} for {arch}: {error}") from error
    _write_whole(target, cubin)
    return cubin


def _write_whole(target: Path, content: bytes) -> None:
    """Write by rename, so that no other process reads half a file; a cache that cannot be written is no error."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(target)
    except OSError:
        return


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        *((f"{kind}_{axis}", ctypes.c_uint) for kind in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise KernelUnavailableError(f"the CUDA driver library cannot be loaded: {error}") from error


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelUnavailableError(f"{what} failed: {(text.value or b'unknown error').decode()} (CUDA error {status})")


class CudaFunction:
    """A loaded kernel. ``prepared`` holds per device the most dynamic shared memory asked for so far."""

    def __init__(self, handle: ctypes.c_void_p, name: str) -> None:
        self.handle, self.name = handle, name
        self.prepared: dict[int, int] = {}


@cache
def load(source: str, function: str, arch: str, macros: tuple[tuple[str, int], ...]) -> CudaFunction:
    """Kernel ``function`` of csrc/cuda/``source``, compiled on first use and usable on every device of that architecture.

    Raises:
        KernelUnavailableError: it cannot be compiled or loaded here.
    """
    cubin = compile_cubin(source, arch, dict(macros))
    torch.cuda.current_stream()  # torch creates the device's context at first use
    driver = _driver()
    library, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver.cuLibraryLoadData(ctypes.byref(library), cubin, None, None, 0, None, None, 0), f"loading {source}")
    _check(driver.cuLibraryGetKernel(ctypes.byref(handle), library, function.encode()), f"finding {function} in {source}")
    return CudaFunction(handle, function)


TensorMap = ctypes.c_uint64 * 16
"""What a kernel takes, 64-byte aligned, to copy boxes of a tensor (CUtensorMap)."""


def describable(x: torch.Tensor) -> torch.Tensor:
    """x (rows, columns), or a copy of it that :func:`tensor_map` can describe, padded with zeros to whole 16 bytes."""
    step = 16 // x.element_size()
    if x.stride(1) != 1:
        x = x.contiguous()
    if x.data_ptr() % 16 or x.stride(0) % step or x.stride(0) < x.shape[1]:
        x = F.pad(x, (0, -x.shape[1] % step)) if x.shape[1] % step else x.clone(memory_format=torch.contiguous_format)
    return x


def tensor_map(x: torch.Tensor, box: tuple[int, int]) -> ctypes.Array[ctypes.c_uint64]:
    """Describes x (rows, columns) to a kernel that copies boxes of (rows, columns) = ``box``, outside of x zeros.

    A row of a box is 128 bytes, whose 16-byte chunks are exchanged by the row modulo 8, or 64 bytes, and they by half the row modulo 4.
    x has contiguous columns, and 16-byte aligned rows. Needs capability 9.0.

    Raises:
        KernelUnavailableError: the driver refuses it.
    """
    return _encode(_TENSOR_MAP_KINDS[x.dtype], x.element_size(), x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), *box)


# The allocator hands out the same memory call after call.
@lru_cache(maxsize=1024)
def _encode(
    kind: int, itemsize: int, pointer: int, rows: int, columns: int, stride: int, box_rows: int, box_columns: int
) -> ctypes.Array[ctypes.c_uint64]:
    # The driver wants the map itself aligned to 64 bytes.
    room = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    found = TensorMap.from_buffer(room, -ctypes.addressof(room) % 64)
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(stride * itemsize)
    extent, steps = (ctypes.c_uint32 * 2)(box_columns, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    options = (_INTERLEAVE_NONE, _SWIZZLE[box_columns * itemsize], _PROMOTE_L2_256B, _FILL_ZEROS)
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(found), kind, 2, ctypes.c_void_p(pointer), sizes, strides, extent, steps, *options
    )
    _check(status, f"describing a {(rows, columns)} tensor")
    return found


def launch(
    function: CudaFunction,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    argument: ctypes.Structure,
    device: int,
    *,
    cluster: tuple[int, int] = (1, 1),
    overlap: bool = False,
    cooperative: bool = False,
    described: ctypes.Array[ctypes.c_uint64] | None = None,
) -> None:
    """Launch with one structure argument on the current stream of ``device``, which must be the current device.

    ``cluster`` groups that many blocks along x and y; ``overlap`` lets the kernel start before its predecessor in the
    stream ends (programmatic dependent launch): only for kernels that wait for it themselves. Both need capability 9.0.
    ``cooperative``: all blocks are resident at once, so that they may wait for each other, or the launch is refused.
    ``described``: the tensor map of a kernel that takes one as its second argument.

    Raises:
        KernelUnavailableError: the driver refuses the launch.
    """
    driver = _driver()
    if shared_bytes > function.prepared.get(device, 48 * 1024):
        status = driver.cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, shared_bytes, function.handle, device)
        _check(status, f"asking for {shared_bytes} bytes of shared memory for {function.name}")
        function.prepared[device] = shared_bytes
    attributes = (_LaunchAttribute * 3)()
    count = 0
    if cluster != (1, 1):
        attributes[count].id = _ATTRIBUTE_CLUSTER
        attributes[count].value[0], attributes[count].value[1], attributes[count].value[2] = *cluster, 1
        count += 1
    if overlap:
        attributes[count].id = _ATTRIBUTE_PROGRAMMATIC
        attributes[count].value[0] = 1
        count += 1
    if cooperative:
        attributes[count].id = _ATTRIBUTE_COOPERATIVE
        attributes[count].value[0] = 1
        count += 1
    stream = torch.cuda.current_stream(device).cuda_stream
    config = _LaunchConfig(grid[0], grid[1], 1, threads, 1, 1, shared_bytes, stream, attributes, count)
    arguments = (ctypes.c_void_p * 2)(ctypes.addressof(argument), ctypes.addressof(described) if described is not None else None)
    _check(driver.cuLaunchKernelEx(ctypes.byref(config), function.handle, arguments, None), f"launching {function.name}")
