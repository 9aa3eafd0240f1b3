"""Sets transformers' Trainer up for one run, and trains from the last whole checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sparse_engine.data.encode import AnswerCollator, Encoded
from sparse_engine.errors import InputError
from sparse_engine.mask import Mask
from sparse_engine.progress import Track
from sparse_engine.train.base import linears_of
from sparse_engine.train.callbacks import KeepMask, ReportProgress, StopOnBrokenLoss
from sparse_engine.train.settings import FinetuneSettings
from sparse_engine.train.trainer import SparseTrainer

__all__ = ["build_trainer", "train_with_resume"]


class _Examples(Dataset[Encoded]):
    """Encoded examples, whose lengths Trainer's length-grouping sampler is told beforehand."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Encoded:
        return self.examples[index]


def build_trainer(
    model: Any,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: FinetuneSettings,
    masks: Mapping[str, Mask],
    work: Path,
    *,
    teacher: nn.Module | None,
    device: torch.device,
    track: Track,
) -> SparseTrainer:
    """A trainer whose checkpoints go to ``work``."""
    stopper = StopOnBrokenLoss(settings.learning_rate)
    callbacks: list[Any] = [stopper, ReportProgress(track, f"fine-tuning ({settings.method})")]
    if settings.method == "sparse-full":
        callbacks.append(KeepMask(linears_of(model, dict(masks)), masks))
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    arguments = _arguments(settings, len(train), work, device)
    collator = AnswerCollator(int(model.config.pad_token_id), all_positions=teacher is not None and settings.distill_on == "all")
    trainer = SparseTrainer(
        model=model,
        args=arguments,
        train_dataset=_Examples(train),
        eval_dataset=_Examples(validation),
        data_collator=collator,
        callbacks=callbacks,
        teacher=teacher,
        settings=settings,
    )
    stopper.trainer = trainer
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    return trainer


def _arguments(settings: FinetuneSettings, examples: int, work: Path, device: torch.device) -> TrainingArguments:
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    world = _world_size()
    updates = max(1, -(-examples // (settings.batch_size * settings.accumulate * world)))
    every = max(1, updates // settings.evaluations)
    if settings.max_steps > 0:
        every = min(every, settings.max_steps)
    total = settings.max_steps if settings.max_steps > 0 else round(updates * settings.epochs)
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup * total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        seed=settings.seed,
        # Examples of like length share a batch, so that little of it is padding.
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        logging_steps=max(1, min(20, every)),
        # The filter would wait for the device at every step; StopOnBrokenLoss looks when a step is logged, checked or saved.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        ddp_find_unused_parameters=False,
    )
    # Several visible GPUs without a launcher would be split over by DataParallel; several GPUs are for `accelerate launch`.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _world_size() -> int:
    from accelerate import PartialState

    return int(PartialState().num_processes) if "RANK" in os.environ else 1


def train_with_resume(trainer: SparseTrainer, *, resume: bool) -> float:
    """Train, from the last checkpoint in the trainer's folder where ``resume`` is on and there is one; the mean training loss.

    Raises:
        SparseEngineError: the loss became NaN or infinite.
        InputError: the device ran out of memory.
    """
    folder = str(trainer.args.output_dir)
    last = get_last_checkpoint(folder) if resume else None  # type: ignore[no-untyped-call]
    try:
        result = trainer.train(resume_from_checkpoint=last)
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            f"the GPU has too little memory for batches of {trainer.settings.batch_size} ({str(error).partition('. ')[0]}); "
            "halve --batch-size and double --accumulate"
        ) from None
    return float(result.training_loss)
