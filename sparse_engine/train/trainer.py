"""transformers' Trainer with the losses of this project: answer cross-entropy, distillation, and hidden states of a teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from sparse_engine.data.encode import IGNORED
from sparse_engine.train.settings import FinetuneSettings

__all__ = ["SparseTrainer", "distillation_loss", "hidden_loss"]


class SparseTrainer(Trainer):
    """Trains on batches of :class:`~sparse_engine.data.encode.AnswerCollator`.

    Args:
        teacher: a frozen model of the same vocabulary whose predictions are learnt beside the labels, or None.
        settings: gives the weights of the losses.

    Attributes:
        broken: bool tensor on the device, True from the first loss on that was not finite. Kept there so that no step waits for it.
    """

    def __init__(self, *args: Any, teacher: nn.Module | None = None, settings: FinetuneSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        self.broken = torch.zeros((), dtype=torch.bool, device=self.args.device)
        # The losses below divide by the number of answer tokens of the whole update themselves.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss per answer token over all examples of the update; in evaluation the cross-entropy alone."""
        s = self.settings
        taught = self.teacher is not None and model.training
        hidden = taught and s.distill_hidden > 0
        fields = {"input_ids": inputs["input_ids"], "logits_to_keep": inputs["logits_to_keep"], "use_cache": False}
        outputs = model(**fields, output_hidden_states=hidden)
        labels = inputs["labels"][:, 1:]
        wanted = labels != IGNORED
        logits = outputs.logits[:, :-1]
        # Trainer averages the losses of the processes, of which each sees its own share of the update's tokens.
        count = wanted.sum() if num_items_in_batch is None or not model.training else num_items_in_batch / self.accelerator.num_processes
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum") / count
        if taught:
            assert self.teacher is not None
            with torch.no_grad(), self._autocast():
                taught_by = self.teacher(**fields, output_hidden_states=hidden)
            inside = torch.arange(inputs["input_ids"].shape[1], device=labels.device) < inputs["lengths"][:, None]
            where, share = (inside[:, 1:], inside[:, 1:].sum() * s.accumulate) if s.distill_on == "all" else (wanted, count)
            term = distillation_loss(logits, taught_by.logits[:, :-1], where, s.distill_temperature) / share
            loss = (1 - s.distill_weight) * loss + s.distill_weight * term
            if hidden:
                loss = loss + s.distill_hidden * hidden_loss(outputs.hidden_states, taught_by.hidden_states, inside) / s.accumulate
        if model.training:
            self.broken |= ~torch.isfinite(loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _autocast(self) -> Any:
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=bool(self.args.bf16))


def distillation_loss(logits: Tensor, teacher: Tensor, where: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) at temperature T, summed over the positions ``where`` (B, T) is True; logits are (B, T, V).

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    student = F.log_softmax(logits.float() / temperature, -1)
    target = F.log_softmax(teacher.float() / temperature, -1)
    # Weighed and not selected: picking positions out would wait for the device at every step.
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
    return (divergence * where).sum() * temperature**2


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], where: Tensor) -> Tensor:
    """Mean over the layers of ‖h_s - h_t‖² / ‖h_t‖² at the positions ``where`` (B, T) is True; hidden states are (B, T, hidden).

    SquareHead of Kurtic et al. 2023, "Sparse Fine-tuning for Inference Acceleration of Large Language Models", section 2.
    """
    inside = where[..., None]
    terms = []
    # The first entry is the embeddings' output, the same for both models as they start.
    for mine, theirs in zip(student[1:], teacher[1:], strict=True):
        target = theirs.float() * inside
        terms.append((mine.float() * inside - target).square().sum() / target.square().sum().clamp_min(1e-12))
    return torch.stack(terms).mean()
