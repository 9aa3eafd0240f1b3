"""Runs stages and keeps their results: a folder that appears by rename with a record of what made it, and is never made twice."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer

from sparse_engine.checkpoint.writer import read_json, write_json
from sparse_engine.data.calibration import calibration_tokens, windows
from sparse_engine.data.pairs import Pair
from sparse_engine.data.prompt import render_example
from sparse_engine.errors import SparseEngineError
from sparse_engine.pattern import SparsityPattern
from sparse_engine.progress import Track
from sparse_engine.study.environment import environment
from sparse_engine.study.graph import Graph, Stage

__all__ = ["CHECKPOINT", "Stages"]

CHECKPOINT = "checkpoint"
_RECORD = "record.json"


class Stages:
    """The cache of one study's stages.

    Args:
        folder: where stages are kept.
        device: of pruning, training and evaluation.
        processes: GPUs (or processes on a CPU) that fine-tuning is launched on by accelerate; 1 runs it here.
    """

    def __init__(self, graph: Graph, folder: Path, device: torch.device, processes: int, track: Track) -> None:
        self.graph, self.folder, self.device, self.processes, self.track = graph, folder, device, processes, track
        self._run: dict[str, Callable[[Stage, Path], dict[str, Any]]] = {
            "prune": self._prune,
            "finetune": self._finetune,
            "merge": self._merge,
            "store": self._store,
            "evaluate": self._evaluate,
            "score": self._score,
        }

    def has(self, stage: Stage) -> bool:
        """Whether the stage is finished; scores that lacked a package or an encoder are made anew."""
        if not (self.folder / stage.folder / _RECORD).exists():
            return False
        return stage.kind != "score" or not any(split["skipped"] for split in self.record(stage)["result"].values())

    def made(self, stage: Stage) -> bool:
        """Whether a checkpoint is there: a model that was given, or a finished stage."""
        return stage.model is not None or self.has(stage)

    def record(self, stage: Stage) -> dict[str, Any]:
        """What was recorded when the stage was made."""
        return read_json(self.folder / stage.folder / _RECORD)

    def ensure(self, stage: Stage) -> Path:
        """The stage's finished folder, made now (with what it needs) if it is not there; an unfinished one is taken up."""
        finished = self.folder / stage.folder
        if self.has(stage):
            return finished
        for needed in stage.inputs.values():
            if needed.model is None:
                self.ensure(needed)
        building = self.folder / (stage.folder + ".building")
        building.mkdir(parents=True, exist_ok=True)
        typer.echo(f"{stage.kind} {stage.key}", err=True)
        started = time.monotonic()
        result = self._run[stage.kind](stage, building)
        record = {
            "kind": stage.kind,
            "key": stage.key,
            "settings": stage.settings,
            "inputs": {role: needed.key for role, needed in stage.inputs.items()},
            "seconds": time.monotonic() - started,
            "environment": environment(),
            "result": result,
        }
        write_json(building / _RECORD, record)
        shutil.rmtree(finished, ignore_errors=True)
        building.rename(finished)
        return finished

    def checkpoint(self, stage: Stage) -> Path:
        """The directory of a stage's checkpoint or adapter."""
        return Path(stage.model) if stage.model is not None else self.folder / stage.folder / CHECKPOINT

    def _prune(self, stage: Stage, folder: Path) -> dict[str, Any]:
        from sparse_engine import pruners
        from sparse_engine.convert import convert
        from sparse_engine.pruners.base import Needs

        source = self.checkpoint(stage.inputs["source"])
        settings = stage.settings
        needs_text = pruners.get(settings["pruner"]).needs is not Needs.NOTHING
        report = convert(
            source,
            folder / CHECKPOINT,
            pattern=SparsityPattern.parse(str(settings["pattern"])),
            pruner=settings["pruner"],
            calibration=self._calibration(settings["calibration"], source) if needs_text else (),
            device=self.device,
            resume=True,
            overwrite=True,
            provenance={"calibration": settings["calibration"]} if needs_text else {},
            track=self.track,
        )
        return {"layers": len(report.layers), "packed_linear_nbytes": report.packed_linear_nbytes}

    def _calibration(self, settings: dict[str, Any], checkpoint: Path) -> list[torch.Tensor]:
        from sparse_engine.checkpoint import Checkpoint
        from sparse_engine.hf.loading import load_tokenizer

        tokenizer = load_tokenizer(checkpoint)
        read = Checkpoint(checkpoint)
        length = settings["length"] or min(read.family.max_length(read.config), 2048)
        sampling = {"samples": settings["samples"], "length": length}
        if settings["source"] != "train":
            return calibration_tokens(settings["source"], tokenizer, seed=settings["seed"], as_prompts=settings["prompts"], **sampling)
        rng = random.Random(settings["seed"])  # noqa: S311 (sampling, not secrets)
        pairs = list(self.graph.examples("train"))
        rng.shuffle(pairs)
        texts = (render_example(pair.text, pair.summary, tokenizer) if settings["prompts"] else pair.text for pair in pairs)
        return windows(texts, tokenizer, rng=rng, what="the training data", **sampling)

    def _finetune(self, stage: Stage, folder: Path) -> dict[str, Any]:
        from sparse_engine.hf.loading import parse_dtype
        from sparse_engine.train.finetune import RECORD, finetune
        from sparse_engine.train.settings import FinetuneSettings

        out = folder / CHECKPOINT
        chosen = {key: value for key, value in stage.settings.items() if key not in ("data", "dtype")}
        teacher = str(self.checkpoint(stage.inputs["teacher"])) if "teacher" in stage.inputs else None
        source, train, heldout = str(self.checkpoint(stage.inputs["source"])), self.graph.examples("train"), self.graph.examples("heldout")
        if self.processes > 1:
            job = {"source": source, "out": str(out), "settings": chosen, "teacher": teacher, "device": self.device.type}
            self._launch(job | {"dtype": stage.settings.get("dtype")}, train, heldout, folder)
        elif not out.exists():
            settings = FinetuneSettings.from_dict(chosen)
            dtype = parse_dtype(stage.settings.get("dtype"))
            where = {"teacher": teacher, "device": self.device, "dtype": dtype}
            finetune(source, out, train, heldout, settings, resume=True, track=self.track, **where)  # type: ignore[arg-type]
        made = read_json(out / RECORD)
        return {
            key: made[key] for key in ("steps", "best_step", "validation_loss", "train_loss", "seconds", "trained_parameters", "history")
        }

    def _launch(self, job: dict[str, Any], train: list[Pair], heldout: list[Pair], folder: Path) -> None:
        for name, pairs in (("train", train), ("validation", heldout)):
            file = folder / f"{name}.jsonl"
            file.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")
            job[name] = str(file)
        write_json(folder / "job.json", job)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(self.processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--cpu"] if self.device.type == "cpu" else ["--multi_gpu"])]
        done = subprocess.run([*command, "-m", "sparse_engine.train", str(folder / "job.json")], check=False)  # noqa: S603
        if done.returncode:
            raise SparseEngineError(
                f"fine-tuning on {self.processes} processes failed with exit code {done.returncode}; its output says why"
            )

    def _merge(self, stage: Stage, folder: Path) -> dict[str, Any]:
        from sparse_engine.train.merge import merge

        adapter = stage.inputs["source"]
        base = str(self.checkpoint(adapter.inputs["source"]))
        apply_mask = bool(stage.settings.get("apply_mask", False))
        report = merge(self.checkpoint(adapter), folder / CHECKPOINT, base=base, apply_mask=apply_mask, overwrite=True)
        return {"dropped": report.dropped}

    def _store(self, stage: Stage, folder: Path) -> dict[str, Any]:
        from sparse_engine.convert import convert

        settings = stage.settings
        report = convert(
            self.checkpoint(stage.inputs["source"]),
            folder / CHECKPOINT,
            values=settings.get("values"),
            head=settings.get("lm_head"),
            output=settings.get("format", "packed"),
            device=self.device,
            resume=True,
            overwrite=True,
            track=self.track,
        )
        return {"layers": len(report.layers), "packed_linear_nbytes": report.packed_linear_nbytes}

    def _evaluate(self, stage: Stage, folder: Path) -> dict[str, Any]:
        from sparse_engine.evaluate.run import EvaluateSettings, generate, load_for_evaluation
        from sparse_engine.evaluate.speed import decode_speed
        from sparse_engine.train.adapters import is_adapter

        source = stage.inputs["source"]
        path = self.checkpoint(source)
        own = ("data", "device", "decode_tokens")
        settings = EvaluateSettings(**{key: value for key, value in stage.settings.items() if key not in own})
        base = str(self.checkpoint(source.inputs["source"])) if is_adapter(path) else None
        loaded = load_for_evaluation(str(path), settings, self.device, base=base)
        result: dict[str, Any] = {}
        for split in self.graph.splits():
            made = generate(loaded, self.graph.examples(split), folder / split, settings, track=self.track)
            result[split] = {key: value for key, value in made.items() if key != "description"}
        tokens = int(stage.settings["decode_tokens"])
        result["speed"] = decode_speed(loaded, self.graph.examples("test"), settings, tokens, batches=(1, settings.batch_size))
        return result

    def _score(self, stage: Stage, folder: Path) -> dict[str, Any]:
        from sparse_engine.evaluate.generate import PREDICTIONS
        from sparse_engine.evaluate.metrics.base import MetricSettings
        from sparse_engine.evaluate.run import score

        source = self.folder / stage.inputs["source"].folder
        encoder = (stage.settings["bertscore_model"], stage.settings["bertscore_layers"], str(self.device))
        result = {}
        for split in self.graph.splits():
            (folder / split).mkdir(exist_ok=True)
            shutil.copyfile(source / split / PREDICTIONS, folder / split / PREDICTIONS)
            result[split] = score(folder / split, stage.settings["metrics"], MetricSettings(*encoder))
        return result
