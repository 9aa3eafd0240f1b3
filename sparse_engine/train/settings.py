"""What a fine-tuning run is: one frozen record that the command line, the study and a launched worker all pass on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_engine.errors import InputError

__all__ = ["METHODS", "FinetuneSettings"]

METHODS = {
    "full": "every weight of a dense model",
    "qlora": "low-rank adapters over a quantised base, as in the study",
    "sparse-lora": "low-rank adapters under the mask of a pruned model, which merge without losing it",
    "sparse-full": "every kept weight of a pruned model, optionally taught by a dense one",
}

_PRECISIONS = ("auto", "bf16", "fp32")
_DISTILL_ON = ("answer", "all")
_ANSWERS = ("reference", "teacher", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """Defaults are the study's (Zolensky et al. 2024): three epochs of Adam at 2e-4, texts of 1,024 and summaries of 128 tokens,
    QLoRA with an 8-bit base, rank 16, alpha 32 and dropout 0.05 on q, k, v, fc1 and fc2 (Dettmers et al. 2023, "QLoRA").

    Attributes:
        batch_size: examples per device and step; ``accumulate`` such steps make one update.
        warmup: share of the updates over which the rate rises before it falls linearly.
        max_steps: stop after so many updates; -1 trains ``epochs``.
        model_dropout: replaces the model's own dropout, which a model that was trained without it does not bear; None keeps it.
        text_windows: at most so many consecutive windows of ``max_text_tokens`` of a training text become examples, each with the
            text's summary. More than the first are texts that the teacher can be asked about, and no true example of the task.
        answers: what follows a training text's prompt: its "reference" summary, the one that the "teacher" writes, or "both", which
            makes two examples of each text (:mod:`sparse_engine.train.answers`).
        evaluations: times per epoch that validation loss is measured and a checkpoint is kept.
        patience: evaluations without a better validation loss before training stops; 0 never stops early.
        bits: 8 or 4 for a quantised base of an adapter method; None picks 8 for qlora and none for sparse-lora; 0 forces none.
        distill_weight: share of the distillation term in the loss, where a teacher is given: (1 - w)·CE + w·T²·KL(teacher ‖ student)
            (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2).
        distill_on: "answer" positions alone, or "all" positions of prompt and answer.
        distill_hidden: weight of the layers' normalised squared error, added to the loss (Kurtic et al. 2023, "Sparse Fine-tuning
            for Inference Acceleration of Large Language Models", SquareHead).
        precision: autocast type; "auto" is bf16 on a GPU that has it, else fp32. Weights are trained in fp32 throughout.

    Raises:
        InputError: a value that cannot be used, or ones that exclude each other.
    """

    method: str = "full"
    epochs: float = 3.0
    max_steps: int = -1
    learning_rate: float = 2e-4
    batch_size: int = 16
    accumulate: int = 1
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    model_dropout: float | None = 0.0
    max_text_tokens: int = 1024
    max_summary_tokens: int = 128
    text_windows: int = 1
    answers: str = "reference"
    evaluations: int = 2
    patience: int = 0
    seed: int = 0
    bits: int | None = None
    rank: int = 16
    alpha: int = 32
    lora_dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "fc1", "fc2")
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    distill_on: str = "answer"
    distill_hidden: float = 0.0
    precision: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        for name, known in (
            ("method", tuple(METHODS)),
            ("precision", _PRECISIONS),
            ("distill_on", _DISTILL_ON),
            ("answers", _ANSWERS),
            ("bits", (None, 0, 4, 8)),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown: use {', '.join(str(k) for k in known if k is not None)}")
        positive = ("epochs", "learning_rate", "batch_size", "accumulate", "evaluations", "rank", "alpha", "distill_temperature")
        for name in (*positive, "max_text_tokens", "max_summary_tokens", "text_windows"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm", "distill_hidden", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(f"max_steps must be -1 or above 0, got {self.max_steps}")
        for name in ("warmup", "model_dropout", "lora_dropout", "distill_weight"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise InputError(f"{name} must lie from 0 to 1, got {getattr(self, name)}")
        if self.bits and self.method not in ("qlora", "sparse-lora"):
            raise InputError(f"--bits {self.bits} quantises a frozen base under adapters; {self.method} trains the base itself")
        if self.method == "qlora" and self.bits is None:
            object.__setattr__(self, "bits", 8)

    @property
    def adapters(self) -> bool:
        """Whether the run trains adapters over a frozen base."""
        return self.method in ("qlora", "sparse-lora")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """The inverse of :meth:`to_dict`; absent fields take their defaults.

        Raises:
            InputError: a key is unknown, or a value is of the wrong type or cannot be used.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := values.keys() - known.keys():
            raise InputError(f"fine-tuning has no setting {min(unknown)!r}; known: {', '.join(known)}")
        try:
            # A recipe may write 3 where 3.0 is meant.
            cast: dict[str, Any] = {
                name: float(value) if isinstance(known[name].default, float) and value is not None else value
                for name, value in values.items()
            }
            return cls(**cast)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"a fine-tuning setting is of the wrong type: {error}") from None
