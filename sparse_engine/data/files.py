"""Reads text files: JSONL and plain text, each as it is, gzipped or Zstandard-compressed, and Parquet."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sparse_engine.errors import InputError

__all__ = ["Rows", "open_text", "read_documents", "read_raw_rows", "read_rows"]

_log = logging.getLogger(__name__)

_ZSTD_WINDOW = 2**27
"""Largest window accepted, in bytes: what `zstd --long` writes by default, and more than the library allows by itself."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Usable rows of a file, and how many were ``skipped`` because they hold no ``text``."""

    rows: list[dict[str, Any]]
    skipped: int


@contextmanager
def open_text(path: Path | str) -> Iterator[TextIO]:
    """Open a UTF-8 file for reading, decompressing ``.gz`` and ``.zst``; line endings are kept as they are.

    Raises:
        InputError: the file is missing, a folder or unreadable, its compression is damaged, it is not UTF-8, or it is ``.zst``
            and the zstandard package is not installed.
    """
    path = Path(path)
    damaged: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile)
    try:
        with path.open("rb") as raw:
            stream: Any = raw
            if path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif path.suffix == ".zst":
                try:
                    import zstandard
                except ModuleNotFoundError:
                    hint = "pip install 'sparse-engine[eval]', or decompress the file first"
                    raise InputError(f"reading {path} needs the zstandard package: {hint}") from None
                damaged += (zstandard.ZstdError,)
                stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).stream_reader(raw, read_across_frames=True)
            yield io.TextIOWrapper(stream, encoding="utf-8", newline="")
    except damaged as error:
        raise InputError(f"{path} is not a whole {path.suffix} file: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _kind(path: Path) -> str:
    suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
    return suffix.lower()


def read_rows(path: Path | str) -> Rows:
    """Rows of a ``.jsonl`` (``.gz``, ``.zst``) or ``.parquet`` file that have a non-empty string ``text``.

    Raises:
        InputError: the file cannot be read, a line is not a JSON object, or no row has ``text``.
    """
    path = Path(path)
    rows = read_raw_rows(path)
    usable = [row for row in rows if isinstance(row.get("text"), str) and row["text"].strip()]
    if not usable:
        raise InputError(f"{path} has no usable rows: none of its {len(rows)} rows has a non-empty `text` field")
    skipped = len(rows) - len(usable)
    if skipped:
        _log.warning("%s: %d of %d rows have no `text` and are left out", path, skipped, len(rows))
    return Rows(usable, skipped)


def read_raw_rows(path: Path | str) -> list[dict[str, Any]]:
    """All rows of a ``.jsonl`` (``.gz``, ``.zst``) or ``.parquet`` file, whatever their fields.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object.
    """
    path = Path(path)
    return _parquet_rows(path) if _kind(path) == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is a JSON {type(row).__name__}, expected an object with a `text` field")
            rows.append(row)
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"cannot read {path}: no such file")
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise InputError(f"reading {path} needs the datasets package: pip install 'sparse-engine[eval]', or pass a .jsonl file") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())}") from None
    return rows


def read_documents(path: Path | str) -> list[dict[str, Any]]:
    """Documents of a file as rows with ``text``: the rows of JSONL or Parquet, or one row holding a whole ``.txt`` file.

    Raises:
        InputError: the file cannot be read, has no usable text, or is of another kind.
    """
    path = Path(path)
    kind = _kind(path)
    if kind in (".jsonl", ".parquet"):
        return read_rows(path).rows
    if kind == ".txt":
        with open_text(path) as stream:
            text = stream.read()
        if not text.strip():
            raise InputError(f"{path} has no usable rows: it is empty")
        return [{"text": text}]
    raise InputError(f"cannot tell what {path} holds: expected .txt or .jsonl (also .gz or .zst), or .parquet")
