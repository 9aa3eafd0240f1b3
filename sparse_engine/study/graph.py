"""The stages that a recipe's rows are made of, each known by a hash of everything its result depends on.

Keys come from the recipe, the contents of the base models and the examples alone, never from paths, times or machines, so that
results of several runs and machines meet in one folder; a stage that two rows share is one stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparse_engine
from sparse_engine.checkpoint import resolve
from sparse_engine.checkpoint.reader import content_digest
from sparse_engine.data.pairs import Pair, load_pairs
from sparse_engine.errors import InputError
from sparse_engine.study.recipe import SPLITS, Recipe, Row, Source

__all__ = ["Graph", "Stage"]

VERSION = 1
"""Raised when a stage's meaning changes, so that old results are not taken for new ones."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One cached piece of work: ``kind`` is prune, finetune, merge, store, evaluate or score; ``inputs`` by role.

    ``model`` is set on the stage that stands for a base model, whose ``key`` is the hash of its files.
    """

    kind: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, Stage]
    model: str | None = None

    @property
    def folder(self) -> str:
        return f"{self.kind}-{self.key}"


class Graph:
    """Stages of a recipe's rows.

    Args:
        device: "cpu" or "cuda": what measured stages depend on beside their inputs.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device
        self._models: dict[str, Stage] = {}
        self._data: dict[str, list[Pair]] = {}
        self._fingerprints: dict[str, str] = {}

    def examples(self, split: str) -> list[Pair]:
        """The examples of train, heldout, validation or test; heldout falls back to validation, and that to test.

        Raises:
            InputError: the recipe has none for ``split``, or their source cannot be read.
        """
        for name in (split, *({"heldout": ("validation", "test")}.get(split, ()))):
            if name in self.recipe.data:
                if name not in self._data:
                    self._data[name] = _load(self.recipe.data[name], name, self.recipe.seed)
                return self._data[name]
        raise InputError(f"the recipe has no data for {split}")

    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in self.recipe.data]

    def checkpoint(self, row: Row) -> Stage:
        """The stage whose checkpoint the row evaluates."""
        current = self.checkpoint(self.recipe.rows[row.start]) if row.start else self._model(row.model)
        for step in row.steps:
            settings = {"seed": self.recipe.seed} | step.settings
            inputs = {"source": current}
            if step.kind == "prune":
                settings["calibration"] = self.recipe.calibration | dict(settings.get("calibration") or {})
                if settings["calibration"]["source"] == "train":
                    settings["data"] = self._fingerprint("train")
            elif step.kind == "finetune":
                settings["data"] = [self._fingerprint(split) for split in ("train", "heldout")]
                if teacher := settings.pop("teacher", None):
                    inputs["teacher"] = self.checkpoint(self.recipe.rows[teacher])
            current = _stage(step.kind, settings, inputs)
        return current

    def evaluation(self, row: Row) -> Stage:
        """The stage that runs the row's model on every split."""
        settings: dict[str, Any] = {"batch_size": 8, "dtype": "auto", "decode_tokens": 64} | row.evaluate
        if settings["dtype"] == "auto":
            settings["dtype"] = "bf16" if self.device == "cuda" else "fp32"
        settings["device"] = self.device
        settings["data"] = {split: self._fingerprint(split) for split in self.splits()}
        return _stage("evaluate", settings, {"source": self.checkpoint(row)})

    def scores(self, row: Row) -> Stage:
        """The stage that scores what the row's model wrote."""
        settings: dict[str, Any] = {"metrics": None, "bertscore_model": "roberta-large", "bertscore_layers": None} | self.recipe.score
        named = Path(settings["bertscore_model"])
        # A local encoder is known by its own name, not by where it lies.
        key = settings | {"bertscore_model": f"{named.parent.name}/{named.name}" if named.is_dir() else str(named)}
        stage = _stage("score", key, {"source": self.evaluation(row)})
        return Stage(stage.kind, stage.key, settings, stage.inputs)

    def _fingerprint(self, split: str) -> str:
        if split not in self._fingerprints:
            self._fingerprints[split] = fingerprint(self.examples(split))
        return self._fingerprints[split]

    def _model(self, name: str) -> Stage:
        if name not in self._models:
            path = resolve(self.recipe.models[name])
            self._models[name] = Stage("model", content_digest(path), {}, {}, model=str(path))
        return self._models[name]


def _stage(kind: str, settings: Mapping[str, Any], inputs: Mapping[str, Stage]) -> Stage:
    described = [kind, VERSION, sparse_engine.__version__, settings, {role: stage.key for role, stage in inputs.items()}]
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
    return Stage(kind, key, dict(settings), dict(inputs))


def fingerprint(pairs: list[Pair]) -> str:
    """Hash of the examples' texts and summaries, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps([pair.text, pair.summary]).encode())
    return digest.hexdigest()[:16]


def _load(source: Source, split: str, seed: int) -> list[Pair]:
    text, summary = source.text_column, source.summary_column
    limit = source.limit if len(source.sources) == 1 else None
    found = [
        pair for one in source.sources for pair in load_pairs(one, split, limit=limit, seed=seed, text_column=text, summary_column=summary)
    ]
    return found[: source.limit]
