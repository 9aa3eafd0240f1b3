"""The write side of a checkpoint: tensors stream into shards of bounded size, and a directory appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparse_engine.errors import InputError, SparseEngineError

__all__ = ["ShardWriter", "check_target", "publish", "read_json", "save_tensors", "write_json"]

SIDE_FILES = ("generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json")
"""Files that go along unchanged with the weights."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, which appears whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote to ``path``.

    Raises:
        InputError: it holds something else by now.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove it and run again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (it holds a {type(content).__name__}); remove it and run again")
    return content


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file, which appears whole.

    Raises:
        SparseEngineError: the disk is full or not writable.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise SparseEngineError(f"could not write {path} ({error}); free space or choose another --out") from None


class ShardWriter:
    """Collects tensors and writes them to ``directory`` as one model.safetensors, or as numbered shards with an index.

    Args:
        limit: most bytes of tensors in one shard; also the most that is held in memory.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += size
        self._total += size

    def finish(self) -> None:
        """Write what is left and give the files their final names."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).replace(self._directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).replace(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self._directory / "model.safetensors.index.json", index)

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending:
            return
        save_tensors(self._part(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer and generation files that ``source`` has."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_target(out: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Refuse, before any work, an ``out`` that must not be replaced.

    Args:
        reads: the directories that the work reads.

    Raises:
        InputError: ``out`` exists and ``overwrite`` is off, it is a file, or one of ``reads`` is it or lies in it.
    """
    if not out.exists():
        return
    if not overwrite:
        raise InputError(f"{out} exists; choose another --out or pass --overwrite")
    if not out.is_dir():
        raise InputError(f"{out} is a file, which --overwrite does not replace; choose another --out")
    for read in reads:
        if read.resolve().is_relative_to(out.resolve()):
            raise InputError(f"--overwrite would replace {read}, which is read; choose another --out")


def publish(finished: Path, out: Path, *, overwrite: bool) -> None:
    """Rename directory ``finished`` to ``out``; with ``overwrite`` an existing one is replaced.

    Raises:
        InputError: ``out`` exists and ``overwrite`` is off.
    """
    if not out.exists():
        finished.rename(out)
        return
    if not overwrite:
        raise InputError(f"{out} exists; choose another --out or pass --overwrite")
    retired = out.with_name(out.name + ".replaced")
    shutil.rmtree(retired, ignore_errors=True)
    out.rename(retired)
    finished.rename(out)
    shutil.rmtree(retired)
