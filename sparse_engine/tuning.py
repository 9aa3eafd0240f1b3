"""Measured times of kernels per GPU, and the configuration that each was fastest with: what dispatch trusts before any estimate.

A table is JSON, one file per GPU: ``{"gpu": NAME, "version": 1, "entries": {pattern: {dtype: {"NxK": {"M": {kernel: [µs, config
...]}}}}}}`` with pattern ``2:4``, ``4:8``, another N:M or ``unstructured``, followed by the type of quantised values (``2:4 int8``), dtype
``bf16``, ``fp16`` or ``fp32``, N output and K input features, and M the most activation rows that an entry is for. Tables in
``sparse_engine/tuned`` are installed with the package; a user's own, written by ``sparse-engine tune`` into the cache folder, goes before
them, entry by entry.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sparse_engine import cuda
from sparse_engine.errors import InputError
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

__all__ = [
    "SHIPPED",
    "USER",
    "Config",
    "Entry",
    "Measured",
    "lookup",
    "pattern_key",
    "record",
    "recorded",
    "shipped_path",
    "slug",
    "user_path",
]

Config = tuple[str | int | float | bool | None, ...]
"""What a kernel may be run with, in the kernel's own terms; JSON scalars, so that a table can hold it."""

VERSION = 1
SHIPPED, USER = "shipped table", "user's table"
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_STANDS_FOR = {"bf16": ("bf16", "fp16"), "fp16": ("fp16", "bf16"), "fp32": ("fp32",)}
"""Types to look for, in order: the 16-bit ones have the same bytes and tensor-core rates."""
_MOST_ROUNDING = 4
"""A bucket stands for as few as a quarter of its rows."""
_SHAPE = re.compile(r"[1-9]\d*x[1-9]\d*")
_ROWS = re.compile(r"[1-9]\d*")

Entries = dict[str, dict[str, dict[str, dict[str, dict[str, list[Any]]]]]]


@dataclass(frozen=True, slots=True)
class Measured:
    """The time of one kernel in µs, the ``config`` it was measured with, and ``source``: :data:`SHIPPED` or :data:`USER`.

    ``stands_in``: it was measured with the other 16-bit type.
    """

    us: float
    config: Config = ()
    source: str = USER
    stands_in: bool = False


def slug(gpu: str) -> str:
    """A GPU's name as file names and result folders carry it: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9.]+", "-", gpu.lower()).strip("-")


def shipped_path(gpu: str) -> Path:
    """Where the installed table of a GPU of this name would be."""
    return Path(__file__).with_name("tuned") / f"{slug(gpu)}.json"


def user_path(gpu: str) -> Path:
    """Where ``sparse-engine tune`` keeps the table of a GPU of this name, in the user's cache."""
    return cuda.cache_folder().parent / "tuning" / f"{slug(gpu)}.json"


def pattern_key(pattern: SparsityPattern, value_type: str = PLAIN) -> str:
    """What tables call a pattern with values of a type; every unstructured sparsity shares one name."""
    name = str(pattern) if pattern.is_nm else "unstructured"
    return name if value_type == PLAIN else f"{name} {value_type}"


def lookup(gpu: str, pattern: str, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> Mapping[str, Measured]:
    """The measured kernels for ``rows`` activation rows of an (out_features, in_features) weight, by name; empty if there are none.

    Times are of the smallest measured bucket that holds ``rows``, if it is at most four times as many. bf16 and fp16 stand in for each
    other where only one of them was measured.
    """
    return _lookup(gpu, user_path(gpu), pattern, _DTYPES[dtype], shape, rows)


@cache
def _lookup(gpu: str, own: Path, pattern: str, dtype: str, shape: tuple[int, int], rows: int) -> Mapping[str, Measured]:
    tables = ((SHIPPED, _read(shipped_path(gpu), gpu)), (USER, _read(own, gpu)))
    for name in _STANDS_FOR[dtype]:
        buckets = [(source, entries.get(pattern, {}).get(name, {}).get(f"{shape[0]}x{shape[1]}", {})) for source, entries in tables]
        fitting = [m for _, held in buckets for m in map(int, held) if rows <= m <= _MOST_ROUNDING * rows]
        if fitting:
            key = str(min(fitting))
            return MappingProxyType(
                {
                    kernel: Measured(float(us), tuple(config), source, name != dtype)
                    for source, held in buckets
                    for kernel, (us, *config) in held.get(key, {}).items()
                }
            )
    return MappingProxyType({})


def recorded(path: Path, gpu: str, pattern: str, dtype: torch.dtype, shape: tuple[int, int], rows: int) -> frozenset[str]:
    """The kernels that the table at ``path`` has for exactly this type and number of rows."""
    held = _read(path, gpu).get(pattern, {}).get(_DTYPES[dtype], {}).get(f"{shape[0]}x{shape[1]}", {})
    return frozenset(held.get(str(rows), {}))


@dataclass(frozen=True, slots=True)
class Entry:
    """The kernels measured for one bucket of rows."""

    pattern: str
    dtype: torch.dtype
    shape: tuple[int, int]
    rows: int
    measured: Mapping[str, Measured]


def record(gpu: str, found: Sequence[Entry], *, path: Path | None = None) -> Path:
    """Add ``found`` to the table at ``path`` (default: the user's), keeping what else it holds; returns the path.

    A damaged table there is moved aside under the ending ``.damaged``.

    Raises:
        InputError: the folder cannot be written.
    """
    path = path or user_path(gpu)
    entries: Entries = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            held = _parse(path, gpu)
            if isinstance(held, dict):
                entries = held
            else:
                path.replace(path.with_name(path.name + ".damaged"))
        for entry in found:
            shapes = entries.setdefault(entry.pattern, {}).setdefault(_DTYPES[entry.dtype], {})
            kernels = shapes.setdefault(f"{entry.shape[0]}x{entry.shape[1]}", {}).setdefault(str(entry.rows), {})
            kernels.update({name: [round(m.us, 3), *m.config] for name, m in entry.measured.items()})
        _write_whole(path, _dumps(gpu, entries))
    except OSError as error:
        raise InputError(f"the tuning table {path} cannot be written: {error.strerror or error}") from None
    _read.cache_clear()
    _lookup.cache_clear()
    return path


def _write_whole(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    temporary = Path(file.name)
    try:
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@cache
def _read(path: Path, gpu: str) -> Entries:
    """The entries of a table, none where there is no file; a damaged one is warned of and ignored."""
    if not path.is_file():
        return {}
    found = _parse(path, gpu)
    if isinstance(found, str):
        warnings.warn(f"the tuning table {path} is ignored: {found}; `sparse-engine tune` writes a new one", stacklevel=2)
        return {}
    return found


def _parse(path: Path, gpu: str) -> Entries | str:
    """The entries of the table at ``path``, or what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    except ValueError as error:
        return f"it is no JSON ({error})"
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return f"it is no table of version {VERSION}"
    if content.get("gpu") != gpu:
        return f"it is for {content.get('gpu')!r}, not {gpu!r}"
    entries: Any = content.get("entries")
    return entries if (wrong := _wrong(entries)) is None else wrong


def _wrong(entries: object) -> str | None:
    levels = ((r".+", "a pattern"), ("|".join(_STANDS_FOR), "a type"), (_SHAPE.pattern, "NxK"), (_ROWS.pattern, "M"), (r".+", "a kernel"))
    level = [("entries", entries)]
    for expected, what in levels:
        below: list[tuple[str, object]] = []
        for where, held in level:
            if not isinstance(held, dict):
                return f"{where} is no object"
            for key, value in held.items():
                if not re.fullmatch(expected, key):
                    return f"{where} has the key {key!r} where {what} belongs"
                below.append((f"{where}.{key}", value))
        level = below
    for where, value in level:
        if not isinstance(value, list) or not value or any(not isinstance(v, str | int | float | None) for v in value):
            return f"{where} is no list of a time and a configuration"
        us = value[0]
        if isinstance(us, bool) or not isinstance(us, int | float) or not (us > 0 and math.isfinite(us)):
            return f"{where} gives {us!r} for a time in µs"
    return None


def _dumps(gpu: str, entries: Entries) -> str:
    """One line per shape, shapes by size, so that a new measurement is a small change of the file."""
    patterns = []
    for pattern, by_dtype in sorted(entries.items()):
        dtypes = []
        for dtype, by_shape in sorted(by_dtype.items()):
            lines = []
            for shape in sorted(by_shape, key=lambda text: (math.prod(map(int, text.split("x"))), text)):
                buckets = {m: dict(sorted(by_shape[shape][m].items())) for m in sorted(by_shape[shape], key=int)}
                lines.append(f'"{shape}":{json.dumps(buckets, separators=(",", ":"), allow_nan=False)}')
            dtypes.append(f'"{dtype}":{{\n' + ",\n".join(lines) + "\n}")
        patterns.append(f"{json.dumps(pattern)}:{{" + ",\n".join(dtypes) + "}")
    return f'{{"gpu":{json.dumps(gpu)},"version":{VERSION},"entries":{{\n' + ",\n".join(patterns) + "\n}}\n"
