"""What happens beside the training steps: the mask is re-applied, broken losses stop the run, progress is shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_engine.errors import SparseEngineError
from sparse_engine.mask import Mask
from sparse_engine.progress import Track
from sparse_engine.train.trainer import SparseTrainer

__all__ = ["KeepMask", "ReportProgress", "StopOnBrokenLoss"]


class KeepMask(TrainerCallback):
    """Sets removed weights back to zero after every optimizer step, and keeps their gradients out of clipping and momentum."""

    def __init__(self, linears: Mapping[str, nn.Linear], masks: Mapping[str, Mask]) -> None:
        self._pairs = [(linear.weight, masks[name].keep) for name, linear in linears.items()]
        for index, (weight, keep) in enumerate(self._pairs):
            weight.register_hook(lambda gradient, index=index: gradient * self._keep(index, gradient.device))  # type: ignore[no-untyped-call]
            with torch.no_grad():
                weight.mul_(keep)

    def _keep(self, index: int, device: torch.device) -> torch.Tensor:
        weight, keep = self._pairs[index]
        if keep.device != device:
            keep = keep.to(device)
            self._pairs[index] = (weight, keep)
        return keep

    @torch.no_grad()
    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for index, (weight, _) in enumerate(self._pairs):
            weight.mul_(self._keep(index, weight.device))


class StopOnBrokenLoss(TrainerCallback):
    """Ends the run when a training or validation loss was NaN or infinite, before such weights are kept or written."""

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self.trainer: SparseTrainer | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate:
            self._check(args, state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check(args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Called before the checkpoint of this step is saved. The last update may have broken weights whose training losses were fine.
        if not math.isfinite(kwargs["metrics"]["eval_loss"]):
            self._stop(state, "validation")

    def _check(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.trainer is not None and bool(self.trainer.broken):
            self._stop(state, "training")

    def _stop(self, state: TrainerState, which: str) -> None:
        good = state.best_model_checkpoint
        raise SparseEngineError(
            f"the {which} loss became NaN or infinite by step {state.global_step}; "
            f"{f'the last good checkpoint is in {good}' if good else 'no checkpoint had been kept yet'}: "
            f"lower --lr (now {self._learning_rate:g}) and start again"
        )


class ReportProgress(TrainerCallback):
    """Advances a :class:`~sparse_engine.progress.Track` by one item per optimizer step, and keeps what the trainer logs."""

    def __init__(self, track: Track, description: str) -> None:
        self._track, self._description = track, description
        self._steps: Iterator[int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            total = max(0, state.max_steps - state.global_step)
            self._steps = iter(self._track(range(total), self._description, total))
            next(self._steps, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._steps is not None:
            next(self._steps, None)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._steps = None
