"""The native CPU library (``csrc``): found and loaded by ctypes once, its signatures and its status codes.

The library lies in the package's folder. In a checkout that is not installed, the environment variable
SPARSE_ENGINE_NATIVE_LIBRARY names the file. SPARSE_ENGINE_ISA (scalar, neon, avx2 or avx512) forces a lower instruction-set level.
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

# torch first: its OpenMP runtime is then the one that the library's own threads run in.
import torch
from torch import Tensor

import sparse_engine
from sparse_engine.errors import InputError, KernelUnavailableError

__all__ = [
    "DTYPES",
    "advise_huge_pages",
    "available",
    "check",
    "dense_linear",
    "expand_tile",
    "function",
    "has_amx_bf16",
    "isa",
    "linear",
    "memory_nodes",
    "read",
    "set_isa",
    "supported_isas",
    "touch",
]

LIBRARY_VARIABLE = "SPARSE_ENGINE_NATIVE_LIBRARY"
ISA_VARIABLE = "SPARSE_ENGINE_ISA"
ABI_VERSION = 3

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3, torch.uint8: 4}
"""Types of tensors and their codes in the library's header; int4 values, two in a byte, are uint8 here."""

_OUT_OF_MEMORY, _UNKNOWN_ISA, _UNSUPPORTED_ISA = 2, 3, 4

_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "abi_version": (_I32, []),
    "status_message": (ctypes.c_char_p, [_I32]),
    "supported_isas": (ctypes.c_char_p, []),
    "isa": (_I32, [ctypes.POINTER(ctypes.c_char_p)]),
    "set_isa": (_I32, [ctypes.c_char_p]),
    "has_amx_bf16": (_I32, []),
    "linear": (
        _I32,
        [_I32, _POINTER, _I32, _POINTER, _I64, _POINTER, _POINTER, _POINTER, _I64, _I64, _POINTER, _POINTER, _I64, _I64, _I64, _I32],
    ),
    "dense_linear": (_I32, [_I32, _POINTER, _I32, _POINTER, _POINTER, _POINTER, _POINTER, _I64, _I64, _I64, _I32]),
    "expand_tile": (_I32, [_I32, _I32, _POINTER, _I64, _POINTER, _POINTER, _POINTER, _I64, _I64, _I64, _I64, _I64, _POINTER, _I32]),
    "advise_huge_pages": (None, [_POINTER, _I64]),
    "read": (_I32, [_POINTER, _I64, _I32, ctypes.POINTER(ctypes.c_uint64)]),
}


class _Library:
    """The loaded library's functions, by their names without the prefix."""

    def __init__(self, path: Path) -> None:
        self._handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            setattr(self, name, self.bind(name, result, arguments))

    def bind(self, name: str, result: object, arguments: list[object]) -> Callable[..., Any]:
        function: Any = getattr(self._handle, f"sparse_engine_{name}")
        function.restype, function.argtypes = result, arguments
        return cast("Callable[..., Any]", function)

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        raise AttributeError(name)


def _path() -> Path:
    if named := os.environ.get(LIBRARY_VARIABLE):
        return Path(named)
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    name = f"{'' if suffix == 'dll' else 'lib'}sparse_engine_cpu.{suffix}"
    # An editable install leaves the Python files in the checkout and puts what was built into site-packages.
    folders = [*map(Path, sparse_engine.__path__), Path(sysconfig.get_path("platlib")) / "sparse_engine"]
    return next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)


@cache
def _load() -> _Library | str:
    """The library, or why there is none."""
    path = _path()
    if not path.is_file():
        return f"needs the native library, and {path} does not exist: install the package, or build csrc and set {LIBRARY_VARIABLE}"
    try:
        library = _Library(path)
    except (OSError, AttributeError) as error:
        return f"needs the native library, and {path} cannot be loaded: {error}"
    if (version := library.abi_version()) != ABI_VERSION:
        return f"needs version {ABI_VERSION} of the native library, and {path} is version {version}: build it again"
    return library


def _library() -> _Library:
    library = _load()
    if isinstance(library, str):
        raise KernelUnavailableError(f"the native CPU kernels cannot be used: this {library}")
    return library


def _raise(library: _Library, status: int, level: str) -> None:
    if status in (_UNKNOWN_ISA, _UNSUPPORTED_ISA):
        usable = library.supported_isas().decode().replace(",", ", ")
        known = "unknown" if status == _UNKNOWN_ISA else "not supported by this machine or build"
        raise InputError(f"instruction-set level {level!r} is {known}; usable here: {usable}")
    message = library.status_message(status).decode()
    if status == _OUT_OF_MEMORY:
        raise MemoryError(message)
    raise InputError(f"the native CPU library refused a call: {message}")


def function(name: str, result: object, arguments: list[object]) -> Callable[..., Any]:
    """Another function of the library, without its prefix; a status that it gives is checked by :func:`check`.

    Raises:
        KernelUnavailableError: there is no usable library, or it is older than the function.
    """
    try:
        return _library().bind(name, result, arguments)
    except AttributeError:
        raise KernelUnavailableError(f"{_path()} has no {name}: build it again") from None


def check(status: int) -> None:
    """Raise what a status other than 0 means.

    Raises:
        InputError: the library refused an argument, or SPARSE_ENGINE_ISA names an unusable level.
        MemoryError: the library could not allocate its scratch.
    """
    if status:
        _raise(_library(), status, os.environ.get(ISA_VARIABLE, ""))


def available() -> str | None:
    """None when the library can be used, else the reason as a phrase that can follow a kernel's name.

    Raises:
        InputError: SPARSE_ENGINE_ISA names a level that is unknown or that this machine lacks.
    """
    library = _load()
    if isinstance(library, str):
        return library
    isa()
    return None


def isa() -> str:
    """The instruction-set level in use: "scalar", "neon", "avx2" or "avx512".

    Raises:
        InputError: SPARSE_ENGINE_ISA names a level that is unknown or that this machine lacks.
        KernelUnavailableError: there is no usable library.
    """
    library = _library()
    name = ctypes.c_char_p()
    if status := library.isa(ctypes.byref(name)):
        _raise(library, status, os.environ.get(ISA_VARIABLE, ""))
    return (name.value or b"").decode()


def supported_isas() -> list[str]:
    """Levels that this machine and build can run, lowest first."""
    text: str = _library().supported_isas().decode()
    return text.split(",")


def set_isa(name: str | None) -> None:
    """Use level ``name`` from now on, or the highest supported one; not while a product runs.

    Raises:
        InputError: unknown or unsupported level.
    """
    library = _library()
    if status := library.set_isa(None if name is None else name.encode()):
        _raise(library, status, name or "")


def has_amx_bf16() -> bool:
    """Whether the processor has AMX tiles for bf16, with which dense bf16 products are faster than fp32 ones."""
    return bool(_library().has_amx_bf16())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _count(values: Tensor) -> int:
    """Values in a tensor of them: int4 ones lie two in a byte, where the one that fills up an odd row counts."""
    return 2 * values.numel() if values.dtype is torch.uint8 else values.numel()


def linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor | None,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    out: Tensor,
    threads: int,
) -> None:
    """out = x Wᵀ + bias with W packed; x (rows of x, columns), out (rows of x, rows), bias (rows,) of one type, all contiguous on the CPU.

    ``values`` are plain ones, or int8 or int4 ones with their ``scales``, which quantise x row by row to int8 too
    (:mod:`sparse_engine.value_types` gives their layout). ``n`` and ``m`` are those of an N:M pattern and 0 for an unstructured one.
    """
    library = _library()
    rows, columns = bitmask.shape[0], x.shape[-1]
    if status := library.linear(
        DTYPES[x.dtype],
        x.data_ptr(),
        DTYPES[values.dtype],
        values.data_ptr(),
        _count(values),
        _address(scales),
        bitmask.data_ptr(),
        _address(row_offsets),
        columns // m * n if m else 0,
        m,
        _address(bias),
        out.data_ptr(),
        out.numel() // rows if rows else 0,
        rows,
        columns,
        threads,
    ):
        _raise(library, status, os.environ.get(ISA_VARIABLE, ""))


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, threads: int, scales: Tensor | None = None) -> None:
    """out = x Wᵀ + bias with W (rows, columns) dense, plain or int8 with ``scales`` (rows,); the rest as for :func:`linear`."""
    library = _library()
    rows, columns = weight.shape
    if status := library.dense_linear(
        DTYPES[x.dtype],
        x.data_ptr(),
        DTYPES[weight.dtype],
        weight.data_ptr(),
        _address(scales),
        _address(bias),
        out.data_ptr(),
        out.numel() // rows if rows else 0,
        rows,
        columns,
        threads,
    ):
        _raise(library, status, os.environ.get(ISA_VARIABLE, ""))


def expand_tile(
    values: Tensor,
    scales: Tensor | None,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    n: int,
    m: int,
    columns: int,
    begin: int,
    end: int,
    out: Tensor,
    threads: int,
) -> None:
    """Rows begin .. end - 1 of a packed weight into ``out`` (end - begin, columns), contiguous, of the values' type or fp32.

    Of int8 and int4 values into any of bf16, fp16 and fp32; the rest as for :func:`linear`.
    """
    library = _library()
    if status := library.expand_tile(
        DTYPES[values.dtype],
        DTYPES[out.dtype],
        values.data_ptr(),
        _count(values),
        _address(scales),
        bitmask.data_ptr(),
        _address(row_offsets),
        columns // m * n if m else 0,
        m,
        begin,
        end,
        columns,
        out.data_ptr(),
        threads,
    ):
        _raise(library, status, os.environ.get(ISA_VARIABLE, ""))


def advise_huge_pages(data: Tensor) -> None:
    """Ask the system to put a tensor's memory on huge pages where it lies; a hint that never fails and changes no value."""
    _library().advise_huge_pages(data.data_ptr(), data.numel() * data.element_size())


@cache
def memory_nodes() -> int:
    """Nodes that this machine's memory belongs to; 1 where the system does not say."""
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))


def touch(data: Tensor, threads: int) -> None:
    """Read a byte of every page of a contiguous tensor, each thread in the share of it that it has in a product.

    Pages that nobody has touched yet, such as those of a mapped file, come to that thread's memory node.
    """
    check(function("touch", _I32, [_POINTER, _I64, _I32])(data.data_ptr(), data.numel() * data.element_size(), threads))


def read(data: Tensor, threads: int) -> int:
    """Sum of a contiguous tensor's bytes as 64-bit words: touches every byte once, the floor of any product over them."""
    library = _library()
    total = ctypes.c_uint64()
    if status := library.read(data.data_ptr(), data.numel() * data.element_size(), threads, ctypes.byref(total)):
        _raise(library, status, os.environ.get(ISA_VARIABLE, ""))
    return total.value
