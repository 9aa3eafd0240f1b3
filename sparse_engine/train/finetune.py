"""``finetune``: a checkpoint and example pairs in, a fine-tuned checkpoint or adapter out, resumable, whole by one rename."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_engine.checkpoint import Checkpoint, resolve
from sparse_engine.checkpoint.writer import check_target, copy_side_files, publish, read_json, write_json
from sparse_engine.data.encode import encode_pairs
from sparse_engine.data.pairs import Pair
from sparse_engine.errors import InputError, SparseEngineError
from sparse_engine.mask import Mask
from sparse_engine.progress import Track, silent
from sparse_engine.train.adapters import RECORD
from sparse_engine.train.base import linears_of, load_dense, load_quantised, masks_of
from sparse_engine.train.save import write_checkpoint
from sparse_engine.train.settings import FinetuneSettings

__all__ = ["RECORD", "FinetuneReport", "check_request", "finetune"]


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """What a run did. Losses are nats per answer token; ``steps`` are optimizer steps, ``best_step`` the one that was kept."""

    out: Path
    steps: int
    best_step: int
    validation_loss: float
    train_loss: float
    seconds: float
    trained_parameters: int


def check_request(source: str, settings: FinetuneSettings, teacher: str | None) -> None:
    """Refuse what can be refused before any example is read.

    Raises:
        InputError: a package is missing, or settings do not fit together.
        CheckpointError: ``source`` or ``teacher`` cannot be used.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("fine-tuning needs the accelerate package: pip install 'sparse-engine[train]'")
    if settings.answers != "reference" and teacher is None:
        raise InputError(f"--answers {settings.answers} needs a --teacher to write them")
    from sparse_engine.hf.loading import load_tokenizer
    from sparse_engine.hf.quantizer import check_dense

    load_tokenizer(resolve(source))
    for one in (source, *([teacher] if teacher else [])):
        checkpoint = Checkpoint(resolve(one))
        if checkpoint.kind == "dense":
            check_dense(checkpoint)


def finetune(
    source: str,
    out: Path,
    train: Sequence[Pair],
    validation: Sequence[Pair],
    settings: FinetuneSettings,
    *,
    teacher: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    resume: bool = False,
    overwrite: bool = False,
    track: Track = silent,
) -> FinetuneReport:
    """Fine-tune a checkpoint on the study's prompt, with the loss on the answer alone.

    ``full`` writes a dense checkpoint, ``sparse-full`` a packed one with the mask it was given, the adapter methods a peft adapter
    directory (see :mod:`sparse_engine.train.merge`). The weights kept are those of the best validation loss. An interrupted run
    leaves ``<out>.partial`` and goes on from its last checkpoint with ``resume``.

    Args:
        teacher: dense checkpoint to distil from (any method).
        dtype: stored type of a written checkpoint; default: the source's.

    Raises:
        InputError: the method does not suit the checkpoint, settings or data cannot be used, or ``out`` exists or must not be
            replaced.
        SparseEngineError: the loss became NaN, or a mask was lost.
    """
    check_target(out, overwrite=overwrite)
    if not train or not validation:
        raise InputError(f"fine-tuning needs training and validation examples, got {len(train)} and {len(validation)}")
    check_request(source, settings, teacher)
    started = time.monotonic()
    path = resolve(source)
    checkpoint = Checkpoint(path)
    check_target(out, overwrite=overwrite, reads=[path, *([resolve(teacher)] if teacher else [])])
    masks = _suited_masks(checkpoint, settings)
    work = out.with_name(out.name + ".partial")
    description = {
        "checkpoint": checkpoint.identity(),
        "teacher": Checkpoint(resolve(teacher)).identity() if teacher else None,
        "settings": settings.to_dict(),
        "data": _fingerprint(train, validation),
    }
    place = _own_device(torch.device(device))
    from sparse_engine.hf.loading import load_tokenizer
    from sparse_engine.train.run import build_trainer, train_with_resume

    tokenizer = load_tokenizer(path)
    answered = partial(_answered, train, teacher, tokenizer, settings, work / "teacher-answers", place, track)
    with _main_process_alone(place) as main:
        if main:
            _begin(work, description, resume=resume)
            answered()
    limits = {
        "max_text_tokens": settings.max_text_tokens,
        "max_summary_tokens": settings.max_summary_tokens,
        "positions": checkpoint.family.max_length(checkpoint.config),
    }
    examples = [
        encode_pairs(track(pairs, f"encoding {name} examples", len(pairs)), tokenizer, text_windows=count, **limits)
        for name, pairs, count in (("training", answered(), settings.text_windows), ("validation", validation, 1))
    ]
    model = _model(path, masks, settings, place)
    taught_by = _teacher(teacher, checkpoint) if teacher else None
    trainer = build_trainer(model, examples[0], examples[1], settings, masks, work, teacher=taught_by, device=place, track=track)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not settings.adapters:
        trained -= sum(int((~mask.keep).sum()) for mask in masks.values())
    train_loss = train_with_resume(trainer, resume=resume)
    report = FinetuneReport(
        out,
        trainer.state.global_step,
        trainer.state.best_global_step or trainer.state.global_step,
        float(trainer.state.best_metric if trainer.state.best_metric is not None else float("nan")),
        train_loss,
        time.monotonic() - started,
        trained,
    )
    if trainer.is_world_process_zero():
        history = [{k: v for k, v in entry.items() if isinstance(v, (int, float))} for entry in trainer.state.log_history]
        record: dict[str, Any] = {
            "base": str(path.resolve()) if Path(source).expanduser().is_dir() else source,
            "teacher": teacher,
            "settings": settings.to_dict(),
            "examples": {"train": len(train), "validation": len(validation)},
            "steps": report.steps,
            "best_step": report.best_step,
            "validation_loss": report.validation_loss,
            "train_loss": report.train_loss,
            "seconds": report.seconds,
            "trained_parameters": trained,
            "tokens_per_epoch": sum(len(e["input_ids"]) for e in examples[0]),
            "device": str(trainer.args.device),
            "history": history,
        }
        _write(trainer.model, checkpoint, masks, settings, out, dtype, record, overwrite=overwrite)
        shutil.rmtree(work)
    trainer.accelerator.wait_for_everyone()
    return report


def _suited_masks(checkpoint: Checkpoint, settings: FinetuneSettings) -> dict[str, Mask]:
    masks = masks_of(checkpoint)
    if settings.method.startswith("sparse-") and not masks:
        raise InputError(
            f"{checkpoint.path} is dense, and --method {settings.method} trains under a mask: prune it first "
            "(`sparse-engine convert --nm 2:4`), or use --method full or qlora"
        )
    if settings.method == "full" and masks:
        raise InputError(
            f"{checkpoint.path} is pruned, and --method full would fill its zeros again: use --method sparse-full to train its kept weights"
        )
    return masks


def _begin(work: Path, description: dict[str, Any], *, resume: bool) -> None:
    job = work / "job.json"
    if not (resume and job.exists()):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        write_json(job, description)
        return
    found = read_json(job)
    now = json.loads(json.dumps(description))
    if changed := sorted(key for key in now if found.get(key) != now[key]):
        raise InputError(
            f"{work} was started differently ({' and '.join(changed)}): resume as it was started, or drop --resume to start anew"
        )


def _own_device(device: torch.device) -> torch.device:
    """The GPU of this process where a launcher has started one for each."""
    rank = os.environ.get("LOCAL_RANK")
    return torch.device(device.type, int(rank)) if device.type == "cuda" and rank is not None else device


@contextmanager
def _main_process_alone(device: torch.device) -> Iterator[bool]:
    """True in the one process of a launch that may write; the others wait until the block is left."""
    if "RANK" not in os.environ:
        yield True
        return
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    yield bool(state.is_main_process)
    state.wait_for_everyone()


def _fingerprint(*parts: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pairs in parts:
        for pair in pairs:
            digest.update(json.dumps([pair.text, pair.summary]).encode())
        digest.update(b"|")
    return digest.hexdigest()


def _model(path: Path, masks: dict[str, Mask], settings: FinetuneSettings, device: torch.device) -> Any:
    torch.manual_seed(settings.seed)
    model = load_quantised(path, settings.bits, device) if settings.bits else load_dense(path)
    if settings.model_dropout is not None:
        model.config.dropout = settings.model_dropout
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = settings.model_dropout
    model.config.use_cache = False
    if settings.adapters:
        from sparse_engine.train.adapters import add_adapters

        return add_adapters(model, masks if settings.method == "sparse-lora" else {}, settings)
    return model


def _teacher(teacher: str, student: Checkpoint) -> Any:
    path = resolve(teacher)
    checkpoint = Checkpoint(path)
    if checkpoint.config["vocab_size"] != student.config["vocab_size"]:
        raise InputError(
            f"teacher {teacher} has {checkpoint.config['vocab_size']} tokens, the student {student.config['vocab_size']}: "
            "distillation needs the same vocabulary"
        )
    return load_dense(path)


def _answered(
    train: Sequence[Pair],
    teacher: str | None,
    tokenizer: Any,
    settings: FinetuneSettings,
    folder: Path,
    device: torch.device,
    track: Track,
) -> Sequence[Pair]:
    """The training examples with the answers that the settings ask for; written by the first call, read by the others."""
    if teacher is None:
        return train
    from sparse_engine.train.answers import teacher_pairs

    return teacher_pairs(resolve(teacher), tokenizer, train, settings, folder, device=device, track=track)


def _write(
    model: Any,
    checkpoint: Checkpoint,
    masks: dict[str, Mask],
    settings: FinetuneSettings,
    out: Path,
    dtype: torch.dtype | None,
    record: dict[str, Any],
    *,
    overwrite: bool,
) -> None:
    if settings.adapters:
        result = out.with_name(out.name + ".new")
        shutil.rmtree(result, ignore_errors=True)
        model.save_pretrained(result)
        copy_side_files(checkpoint.path, result)
        write_json(result / RECORD, record)
        publish(result, out, overwrite=overwrite)
        return
    if masks:
        for name, linear in linears_of(model, masks).items():
            if bool((linear.weight.detach().cpu() != 0)[~masks[name].keep].any()):
                raise SparseEngineError(f"{name} has non-zero weights that its mask removes after training; nothing was written")
    first = checkpoint.family.linears(checkpoint.config)[0]
    stored = checkpoint.packed_layers[first].dtype if first in checkpoint.packed_layers else checkpoint.spec(f"{first}.weight")[1]
    source = (checkpoint.manifest or {}).get("made", {})
    write_checkpoint(
        checkpoint.config,
        model.state_dict(),
        masks,
        out,
        side_files=checkpoint.path,
        dtype=dtype or stored,
        made=source | {"finetuned": settings.method},
        beside={RECORD: record},
        overwrite=overwrite,
    )
