"""``convert``: checks first, then prune, pack, assemble, verify, and one rename."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_engine
from sparse_engine import formats, pruners, value_types
from sparse_engine.checkpoint import Checkpoint, LayerSpec, resolve, storage
from sparse_engine.checkpoint.reader import MANIFEST
from sparse_engine.checkpoint.storage.base import Storage
from sparse_engine.checkpoint.storage.packed import PackedStorage
from sparse_engine.checkpoint.writer import ShardWriter, check_target, copy_side_files, publish, write_json
from sparse_engine.convert.job import Job, checksum, manifest_entry
from sparse_engine.convert.sequential import prune_layers
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.progress import Track, silent
from sparse_engine.pruners.base import Needs
from sparse_engine.value_types import PLAIN

__all__ = ["ConvertReport", "convert", "verify"]

_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did; sizes in bytes, of the pruned linears' weights and of all weight files."""

    out: Path
    layers: dict[str, LayerSpec]
    seconds: float
    dense_linear_nbytes: int
    packed_linear_nbytes: int
    source_nbytes: int
    out_nbytes: int
    peak_rss_nbytes: int


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    pattern: SparsityPattern | None = None,
    pruner: str = "magnitude",
    calibration: Sequence[Tensor] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    values: str | None = None,
    head: str | None = None,
    output: str = "packed",
    resume: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    track: Track = silent,
    max_shard_bytes: int = _SHARD_BYTES,
) -> ConvertReport:
    """Prune a dense checkpoint to ``pattern`` and write it to directory ``out``; or re-write a packed one in another form.

    ``out`` appears by rename when everything is written and verified: each linear read back from it unpacks to the bytes
    of the masked dense weight. Finished layers are kept in ``<out>.partial`` until then.

    Args:
        source: directory or Hub id.
        pattern: what to prune to; None only for a checkpoint that is packed already.
        pruner: a registered pruner's name.
        calibration: token ids int64 (T,) per sample, for pruners that need statistics.
        device: where one layer at a time is computed.
        dtype: type of all stored floating-point weights; None keeps the checkpoint's.
        values: "int8", "fp8" or "int4" quantises the kept weights; None keeps how they are stored.
        head: "int8" asks the decode step for an int8 copy of the output head (``SparseOPTConfig.head_values``); packed output only.
        output: "packed", "dense" or "compressed-tensors".
        resume: go on from an interrupted run with the same settings; the result is the same to the bit.
        overwrite: replace an existing ``out``.
        provenance: settings to record in the manifest, such as where the calibration text came from.
        max_shard_bytes: most bytes per weight file.

    Raises:
        InputError: settings that do not fit together or the checkpoint, or ``out`` exists or must not be replaced.
        CheckpointError: the checkpoint cannot be used, or a packed one is damaged.
        SparseEngineError: the result could not be written.
    """
    started = time.monotonic()
    out = Path(out)
    check_target(out, overwrite=overwrite)
    if dtype is not None and dtype not in VALUE_DTYPES:
        raise InputError(f"cannot store weights as {dtype}; use bfloat16, float16 or float32")
    checkpoint = Checkpoint(resolve(source))
    check_target(out, overwrite=overwrite, reads=[checkpoint.path])
    conversion = _Conversion(
        checkpoint,
        pattern,
        pruner,
        calibration,
        torch.device(device),
        dtype,
        None if values is None else value_types.quantised(values).name,
        head,
        storage.get(output),
        dict(provenance or {}),
        max_shard_bytes,
        track,
    )
    conversion.check()
    job = Job(out, conversion.settings())
    try:
        conversion.fill(job, done=job.begin(resume=resume))
        layers = conversion.assemble(job)
        verify(Checkpoint(job.result), track=track)
        publish(job.result, out, overwrite=overwrite)
    except Exception:
        if job.finished_layers() == 0:
            job.discard()
        raise
    job.discard()
    finished = Checkpoint(out)
    return ConvertReport(
        out,
        layers,
        time.monotonic() - started,
        sum(spec.shape[0] * spec.shape[1] * spec.dtype.itemsize for spec in layers.values()),
        sum(finished.tensor_nbytes(name) for name in finished.names() if _weight_of(name) in layers),
        checkpoint.nbytes,
        finished.nbytes,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def verify(checkpoint: Checkpoint, *, track: Track = silent) -> None:
    """Check every pruned linear of a converted checkpoint against the sha256 that its manifest records.

    Raises:
        CheckpointError: there is no manifest, or a linear's unpacked bytes are not those that were written.
    """
    if checkpoint.manifest is None:
        raise CheckpointError(f"{checkpoint.path} has no {MANIFEST} to verify against; only converted checkpoints have one")
    recorded = checkpoint.manifest["layers"]
    for name in track(sorted(recorded), "verifying", len(recorded)):
        if checksum(checkpoint.weight(name)) != recorded[name]["sha256"]:
            raise CheckpointError(f"{checkpoint.path}: {name} does not unpack to the bytes that were written; the file is damaged")


@dataclass(slots=True)
class _Conversion:
    """One call's settings, and its three steps."""

    checkpoint: Checkpoint
    pattern: SparsityPattern | None
    pruner: str
    calibration: Sequence[Tensor]
    device: torch.device
    dtype: torch.dtype | None
    values: str | None
    head: str | None
    target: Storage
    provenance: dict[str, Any]
    max_shard_bytes: int
    track: Track

    def check(self) -> None:
        """Refuse what cannot work before anything is written."""
        checkpoint, pattern = self.checkpoint, self.pattern
        family, config = checkpoint.family, checkpoint.config
        held = sorted({layer.value_type for layer in checkpoint.packed_layers.values()} - {PLAIN})
        if held and self.values is not None:
            raise InputError(f"{checkpoint.path} holds {' and '.join(held)} values already; quantise the checkpoint that it came from")
        if self.head is not None and (self.head != "int8" or self.target.quant_method != PackedStorage.quant_method):
            raise InputError(f"the output head can be int8 in a packed checkpoint, got {self.head!r} for {self.target.name}")
        for value_type in (*held, self.values or PLAIN):
            if reason := self.target.refuses(value_type):
                raise InputError(reason)
        if checkpoint.packed_layers:
            if pattern is not None:
                raise InputError(
                    f"{checkpoint.path} is packed already; prune the dense checkpoint it came from, or give no pattern to re-write it"
                )
            if checkpoint.manifest is not None:
                # Damaged weights would get checksums of their own.
                verify(checkpoint, track=self.track)
            return
        if pattern is None:
            raise InputError(f"{checkpoint.path} is dense: give a pattern such as --nm 2:4 or --sparsity 0.5")
        for linear in family.linears(config):
            pattern.check_shape(family.linear_shape(config, linear), linear)
            checkpoint.check_dense(linear)
        if pruners.get(self.pruner).needs is not Needs.NOTHING:
            self._check_calibration()

    def _check_calibration(self) -> None:
        limit = self.checkpoint.family.max_length(self.checkpoint.config)
        vocabulary = int(self.checkpoint.config["vocab_size"])
        if not self.calibration:
            raise InputError(
                f"pruner {self.pruner} needs calibration text: pass --calibration FILE, c4 or billsum, or use --pruner magnitude"
            )
        for sample in self.calibration:
            if sample.dim() != 1 or not 0 < sample.numel() <= limit:
                raise InputError(f"calibration samples are 1 to {limit} tokens long, got shape {tuple(sample.shape)}")
            if int(sample.min()) < 0 or int(sample.max()) >= vocabulary:
                raise InputError(
                    f"calibration holds token id {int(sample.max())}, but there are {vocabulary}: is the tokenizer this model's?"
                )

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values."""
        text = hashlib.sha256()
        for sample in self.calibration:
            text.update(f"{sample.numel()} ".encode() + sample.contiguous().numpy().tobytes())
        return {
            "checkpoint": self.checkpoint.identity(),
            "pattern": str(self.pattern),
            "pruner": self.pruner,
            "calibration": text.hexdigest(),
            "dtype": str(self.dtype),
            "values": self.values,
            "head": self.head,
            "version": sparse_engine.__version__,
        }

    def fill(self, job: Job, *, done: int) -> None:
        """Bring every layer's packed linears into the job, of which ``done`` layers are there already."""
        family, config = self.checkpoint.family, self.checkpoint.config
        count = family.layer_count(config)
        if self.pattern is not None:
            dtype = self.dtype or self.checkpoint.spec(f"{family.linears(config)[0]}.weight")[1]
            steps = prune_layers(
                self.checkpoint,
                job,
                done=done,
                pattern=self.pattern,
                pruner=pruners.get(self.pruner),
                calibration=self.calibration,
                device=self.device,
                dtype=dtype,
                value_type=self.values or PLAIN,
            )
            for _ in self.track(steps, f"pruning to {self.pattern} by {self.pruner}", count):
                pass
            return
        for index in self.track(range(count), "reading packed layers", count):
            inside = f"{family.layer_prefix(index)}."
            names = [name for name in self.checkpoint.packed_layers if name.startswith(inside)]
            job.save(index, {name: _cast(self.checkpoint.packed(name), self.dtype, self.values, name) for name in names})

    def assemble(self, job: Job) -> dict[str, LayerSpec]:
        """Write the whole result into the job's folder: weights, config, tokenizer, manifest."""
        checkpoint, dtype = self.checkpoint, self.dtype
        family, config = checkpoint.family, checkpoint.config
        job.result.mkdir()
        writer = ShardWriter(job.result, self.max_shard_bytes)
        layers: dict[str, LayerSpec] = {}
        recorded: dict[str, Any] = {}
        count = family.layer_count(config)
        for index in self.track(range(count), "writing", count):
            for name, packed in job.load(index).items():
                layers[name] = LayerSpec.of(packed)
                recorded[name] = manifest_entry(packed)
                for full, tensor in self.target.encode(name, packed).items():
                    writer.add(full, tensor)
        for name in checkpoint.names():
            if family.drops(config, name) or _weight_of(name) in layers:
                continue
            tensor = checkpoint.tensor(name)
            writer.add(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
        writer.finish()
        dense = family.dense_config(config)
        if dtype is not None:
            dense["dtype"] = str(dtype).removeprefix("torch.")
        written = self.target.config(dense, layers)
        if self.target.quant_method == PackedStorage.quant_method and (head := self.head or config.get("head_values")):
            written["head_values"] = head
        write_json(job.result / "config.json", written)
        copy_side_files(checkpoint.path, job.result)
        made: dict[str, Any] = {"pruner": self.pruner, "pattern": str(self.pattern)} | self.provenance
        if self.pattern is None:
            made = dict((checkpoint.manifest or {}).get("made", {})) | self.provenance
        write_json(job.result / MANIFEST, {"version": 1, "sparse_engine": sparse_engine.__version__, "made": made, "layers": recorded})
        return layers


def _cast(packed: PackedWeight, dtype: torch.dtype | None, values: str | None, name: str) -> PackedWeight:
    dtype = dtype or packed.dtype
    if values is None and dtype == packed.dtype:
        return packed
    if packed.value_type != PLAIN:
        return replace(packed, dtype=dtype)
    fmt = formats.get(packed.format)
    return fmt.pack(fmt.unpack(packed).to(dtype), Mask(packed.pattern, fmt.keep(packed)), name, values or PLAIN)


def _weight_of(name: str) -> str | None:
    """The linear whose weight tensor ``name`` is, or is part of; None for a bias."""
    linear, _, part = name.rpartition(".")
    return None if part == "bias" else linear
