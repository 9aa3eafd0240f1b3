"""The read side of a checkpoint directory: headers first, tensors one at a time from the memory-mapped files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_engine import formats, models
from sparse_engine.checkpoint import storage
from sparse_engine.checkpoint.storage.base import LayerSpec
from sparse_engine.errors import CheckpointError
from sparse_engine.formats.base import PackedWeight

__all__ = ["MANIFEST", "Checkpoint", "content_digest"]

MANIFEST = "sparse_engine.json"
"""Provenance and checksums of a converted checkpoint, beside its config.json."""

_DTYPES = {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


class Checkpoint:
    """A model directory: dense, packed by this project, or packed by compressed-tensors; weights in safetensors only.

    Tensor names are canonical ("model.decoder.layers.0.fc1.weight"), whatever prefix the files use. Only headers are read
    on construction; every size is known and checked before a tensor is.

    Args:
        path: directory with config.json and .safetensors files (one, or shards with their index).

    Raises:
        CheckpointError: files are missing, truncated, pickled or contradictory, or the architecture is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"there is no checkpoint directory {self.path}")
        self.config = _read_json(self.path / "config.json")
        try:
            self.family = models.for_config(self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        self.storage = storage.detect(self.config)
        self._files = {name: safe_open_file(self.path / name) for name in _weight_files(self.path)}
        self._where: dict[str, tuple[str, str]] = {}
        for file, handle in self._files.items():
            for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                name = self.family.canonical(key)
                if name in self._where:
                    raise CheckpointError(f"{self.path}: tensor {name} stands in both {self._where[name][0]} and {file}")
                self._where[name] = (file, key)

    @property
    def kind(self) -> str:
        """ "dense", "sparse_engine" or "compressed-tensors"."""
        return self.storage.quant_method or "dense"

    def names(self) -> list[str]:
        """Canonical names of all stored tensors, sorted."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a stored tensor, from the file's header.

        Raises:
            CheckpointError: it is missing, or of a type that no OPT checkpoint uses.
        """
        file, key = self._locate(name)
        header = self._files[file].get_slice(key)
        if header.get_dtype() not in _DTYPES:
            raise CheckpointError(f"{self.path}/{file}: tensor {name} has unsupported type {header.get_dtype()}")
        return tuple(header.get_shape()), _DTYPES[header.get_dtype()]

    def tensor_nbytes(self, name: str) -> int:
        """Bytes of a stored tensor."""
        shape, dtype = self.spec(name)
        return math.prod(shape) * dtype.itemsize

    def tensor(self, name: str) -> Tensor:
        """One stored tensor on the CPU, mapped from its file.

        Raises:
            CheckpointError: it is missing.
        """
        file, key = self._locate(name)
        tensor: Tensor = self._files[file].get_tensor(key)
        return tensor

    def _locate(self, name: str) -> tuple[str, str]:
        if name not in self._where:
            raise CheckpointError(f"{self.path}: tensor {name} is missing from the checkpoint")
        return self._where[name]

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """(out_features, in_features) that the config gives ``linear``."""
        return self.family.linear_shape(self.config, linear)

    @cached_property
    def packed_layers(self) -> dict[str, LayerSpec]:
        """The pruned linears stored packed, by name; empty for a dense checkpoint."""
        return self.storage.layers(self)

    def packed(self, linear: str) -> PackedWeight:
        """A packed linear in its neutral form, validated so that kernels may trust it.

        Raises:
            CheckpointError: it is not stored packed, or its tensors contradict each other.
        """
        packed = self.storage.read(self, linear)
        formats.get(packed.format).check(packed, linear)
        return packed

    def weight(self, linear: str) -> Tensor:
        """The dense (out_features, in_features) weight of a linear, unpacked where it is stored packed.

        Raises:
            CheckpointError: it is missing or has another shape than the config says.
        """
        if linear in self.packed_layers:
            packed = self.packed(linear)
            return formats.get(packed.format).unpack(packed)
        self.check_dense(linear)
        return self.tensor(f"{linear}.weight")

    def check_dense(self, linear: str) -> None:
        """Raise :class:`CheckpointError` unless a dense linear's weight is there in the shape that the config gives."""
        shape, _ = self.spec(f"{linear}.weight")
        if shape != self.linear_shape(linear):
            raise CheckpointError(f"{self.path}: {linear}.weight is {shape}, where the config gives {self.linear_shape(linear)}")

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """Provenance and checksums written by the converter, or None."""
        file = self.path / MANIFEST
        return _read_json(file) if file.exists() else None

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another at no cost: its config and each weight file's size and time of change."""
        stats = {file: (self.path / file).stat() for file in sorted(self._files)}
        return {"config": self.config, "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}}

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum((self.path / file).stat().st_size for file in self._files)


def content_digest(folder: Path) -> str:
    """What tells the checkpoint or adapter in ``folder`` from every other, wherever it lies: a hash of its config and weights."""
    digest = hashlib.sha256()
    configs = [folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()]
    for file in [*configs, *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def safe_open_file(path: Path) -> Any:
    """Open a safetensors file on the CPU; its header and length are checked.

    Raises:
        CheckpointError: it is missing, truncated or no safetensors file.
    """
    try:
        # No context manager: the mapping lives as long as its tensors do.
        return safe_open(path, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint directory holds config.json and .safetensors files") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _weight_files(path: Path) -> list[str]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {name!r}, which is no .safetensors file of its own directory")
        return names
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if not names:
        if pickled := sorted(file.name for kind in _PICKLED for file in path.glob(kind)):
            raise CheckpointError(f"{path} holds only {pickled[0]}: pickled weights can run code and are refused; save them as safetensors")
        raise CheckpointError(f"{path} holds no .safetensors file")
    return names
