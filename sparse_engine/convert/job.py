"""An unfinished conversion on disk: whole layer files beside a description of the job, so that it can be resumed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_engine import formats
from sparse_engine.checkpoint.storage.base import LayerSpec
from sparse_engine.checkpoint.writer import read_json, save_tensors, write_json
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern

__all__ = ["Job", "checksum"]


def checksum(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in row-major order, as hexadecimal."""
    data = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()


class Job:
    """The folder ``<out>.partial`` of one conversion.

    Every finished layer is one safetensors file that appeared by rename, so that what is there after a kill is whole.

    Args:
        out: where the result will be.
        settings: everything that the result depends on; a job is resumed only under the same settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.folder = out.with_name(out.name + ".partial")
        self.result = self.folder / "result"
        self._settings = dict(settings)

    def begin(self, *, resume: bool) -> int:
        """Create or take up the folder; the number of layers already finished.

        Raises:
            InputError: an unfinished job is there and ``resume`` is off, or it was started with other settings.
        """
        description = self.folder / "job.json"
        if not resume or not description.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(description, self._settings)
            return 0
        found = read_json(description)
        changed = sorted(key for key in self._settings.keys() | found.keys() if self._settings.get(key) != found.get(key))
        if changed:
            names = " and ".join(changed)
            raise InputError(
                f"{self.folder} was started with another {names}; resume with the same settings, or drop --resume to start anew"
            )
        shutil.rmtree(self.result, ignore_errors=True)
        done = 0
        while self._file(done).exists():
            done += 1
        return done

    def save(self, index: int, packed: Mapping[str, PackedWeight]) -> None:
        """Store one finished layer: its pruned linears by full name."""
        tensors = {f"{name}.{part}": tensor for name, weight in packed.items() for part, tensor in weight.tensors.items()}
        described = {
            name: {
                "pattern": str(weight.pattern),
                "shape": list(weight.shape),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "values": weight.value_type,
            }
            for name, weight in packed.items()
        }
        write_json(self._file(index).with_suffix(".json"), described)
        save_tensors(self._file(index), tensors)

    def load(self, index: int) -> dict[str, PackedWeight]:
        """The pruned linears of a finished layer."""
        described = read_json(self._file(index).with_suffix(".json"))
        tensors = load_file(self._file(index))
        found: dict[str, PackedWeight] = {}
        for name, entry in described.items():
            pattern = SparsityPattern.parse(entry["pattern"])
            fmt = formats.for_pattern(pattern)
            parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
            rows, columns = entry["shape"]
            dtype = getattr(torch, entry["dtype"])
            found[name] = PackedWeight(fmt.name, fmt.version, pattern, (rows, columns), dtype, parts, entry["values"])
            fmt.check(found[name], name)
        return found

    def finished_layers(self) -> int:
        return sum(1 for _ in self.folder.glob("layer-*.safetensors"))

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"


def manifest_entry(packed: PackedWeight) -> dict[str, Any]:
    """What the manifest records of one pruned linear: its sha256 is of the masked dense bytes."""
    spec = LayerSpec.of(packed)
    return {
        "pattern": str(spec.pattern),
        "shape": list(spec.shape),
        "nnz": spec.nnz,
        "values": spec.value_type,
        "sha256": checksum(formats.get(packed.format).unpack(packed)),
    }
