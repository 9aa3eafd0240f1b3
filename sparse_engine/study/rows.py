"""A finished row as one JSON file, and the flat table line that is made from it and from its dense reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_engine.evaluate.bootstrap import Interval, ratio_interval
from sparse_engine.evaluate.generate import PREDICTIONS, read_predictions
from sparse_engine.study.environment import environment
from sparse_engine.study.graph import Graph, Stage
from sparse_engine.study.recipe import SPLITS, Row
from sparse_engine.study.stages import Stages

__all__ = ["row_result", "table_line"]

_MEASURES = ("blank", "repeated_4grams", "novel_2grams", "coverage", "density", "length_ratio")
_COSTS = ("parameters", "nonzero", "weight_nbytes", "disk_nbytes", "peak_device_nbytes", "peak_host_nbytes")
_WAYS = ("kind", "device", "kernels", "loop")


def row_result(row: Row, graph: Graph, stages: Stages, *, examples: int) -> dict[str, Any]:
    """Everything that the report needs of a row whose stages are finished, without their folders."""
    evaluation, scores = graph.evaluation(row), graph.scores(row)
    made, scored = stages.record(evaluation), stages.record(scores)
    result = made["result"]
    splits: dict[str, Any] = {}
    for split in graph.splits():
        run = result[split]
        folder = stages.folder / evaluation.folder / split
        splits[split] = {
            "metrics": scored["result"][split]["metrics"],
            "skipped": scored["result"][split]["skipped"],
            "each": {name: scored["result"][split]["each"][name] for name in ("rougeL",) if name in scored["result"][split]["each"]},
            "answer_nll": run["answer_nll"],
            "answer_tokens": run["answer_tokens"],
            "answer_ppl": run["answer_ppl"],
            **{key: run[key] for key in ("examples", "seconds", "new_tokens", "tokens_per_second")},
            "predictions": _examples(folder, examples),
        }
    return {
        "id": row.id,
        "model": row.model,
        "labels": row.labels,
        "published": row.published,
        "keys": {"evaluate": evaluation.key, "score": scores.key},
        "settings": made["settings"],
        "steps": _steps(graph.checkpoint(row), stages),
        "splits": splits,
        "cost": {key: result["test"][key] for key in (*_COSTS, *_WAYS)},
        "speed": result["speed"],
        "evaluated_on": made["environment"],
        "scored_with": scored["settings"],
        "environment": environment(),
    }


def _examples(folder: Path, count: int) -> list[dict[str, str]]:
    some = read_predictions(folder / PREDICTIONS)[:count]
    return [{"id": p.id, "title": p.title, "source": p.source[:600], "reference": p.reference, "prediction": p.prediction} for p in some]


def _steps(stage: Stage, stages: Stages) -> list[dict[str, Any]]:
    """The stages from the base model to this one, each with its settings, its cost and what came of it."""
    if stage.model is not None:
        return []
    before = _steps(stage.inputs["source"], stages)
    if not (stages.folder / stage.folder / "record.json").exists():
        # The checkpoint was made elsewhere, and only the evaluation was brought here.
        return [*before, {"kind": stage.kind, "key": stage.key, "settings": stage.settings}]
    record = stages.record(stage)
    kept = {key: value for key, value in record["result"].items() if key != "history"}
    return [*before, {"kind": stage.kind, "key": stage.key, "settings": stage.settings, "seconds": record["seconds"], "result": kept}]


def table_line(result: Mapping[str, Any], dense: Mapping[str, Any] | None) -> dict[str, Any]:
    """All columns of one row by name, flat; what could not be measured is None.

    Args:
        dense: the finished row of the dense reference, for speed-ups, size ratios and recoveries; None leaves those empty.
    """
    line: dict[str, Any] = {"id": result["id"], "model": result["model"], **result["labels"], "engine": result["cost"]["kind"]}
    line["loop"] = result["cost"]["loop"]
    published = result["published"]
    for split in SPLITS:
        measured = result["splits"].get(split, {})
        for metric in ("rouge1", "rouge2", "rougeL", "bertscore"):
            interval = measured.get("metrics", {}).get(metric)
            for part in ("value", "low", "high"):
                name = f"{split}_{metric}" + ("" if part == "value" else f"_{part}")
                line[name] = None if interval is None else interval[part]
            if f"{split}_{metric}" in published:
                line[f"{split}_{metric}_published"] = published[f"{split}_{metric}"]
        line[f"{split}_answer_ppl"] = measured.get("answer_ppl")
        line[f"{split}_tokens_per_second"] = measured.get("tokens_per_second")
        for metric in _MEASURES:
            interval = measured.get("metrics", {}).get(metric)
            line[f"{split}_{metric}"] = None if interval is None else interval["value"]
    line |= _costs(result, dense)
    for column, name in (("seconds", "seconds_published"), ("nonzero", "nonzero_published"), ("size_mb", "size_mb_published")):
        if column in published:
            line[name] = published[column]
    return line


def _costs(result: Mapping[str, Any], dense: Mapping[str, Any] | None) -> dict[str, Any]:
    cost = result["cost"]
    line: dict[str, Any] = {
        "seconds": sum(split["seconds"] for split in result["splits"].values()),
        "examples": sum(split["examples"] for split in result["splits"].values()),
        "batch_size": result["settings"]["batch_size"],
        "dtype": result["settings"]["dtype"],
        "device": cost["device"],
        "parameters": cost["parameters"],
        "nonzero": cost["nonzero"],
        "size_mb": cost["disk_nbytes"] / 1e6,
        "weights_mb": cost["weight_nbytes"] / 1e6,
        "peak_device_mb": None if cost["peak_device_nbytes"] is None else cost["peak_device_nbytes"] / 1e6,
        "peak_host_mb": None if cost["peak_host_nbytes"] is None else cost["peak_host_nbytes"] / 1e6,
        "train_seconds": _seconds(result, "finetune"),
        "prune_seconds": _seconds(result, "prune"),
        "heldout_loss": _heldout_loss(result),
    }
    line["seconds_per_example"] = line["seconds"] / line["examples"]
    for batch, speed in result["speed"].items():
        line[f"token_ms_batch_{batch}"] = speed["token_ms"]
        line[f"prompt_ms_batch_{batch}"] = speed["prompt_ms"]
        reference = dense and dense["speed"].get(batch) if _comparable(result, dense) else None
        times = (reference["token_ms"] if reference else None, speed["token_ms"])
        line[f"speedup_batch_{batch}"] = times[0] / times[1] if all(times) else None
    line["size_ratio"] = cost["disk_nbytes"] / dense["cost"]["disk_nbytes"] if dense else None
    for name, interval in _recoveries(result, dense).items():
        line |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return line


def _comparable(result: Mapping[str, Any], dense: Mapping[str, Any] | None) -> bool:
    """Whether both rows ran on the same device, in the same type and by the same token loop: else a speed-up would mean nothing."""
    if dense is None or _loop(result) != _loop(dense):
        return False
    return all(
        result[part][key] == dense[part][key] for part, key in (("cost", "device"), ("settings", "dtype"), ("settings", "batch_size"))
    )


def _loop(result: Mapping[str, Any]) -> str:
    """Whose loop generated the tokens, without the reason."""
    return str(result["cost"]["loop"]).partition(",")[0].partition(" ")[0]


def _seconds(result: Mapping[str, Any], kind: str) -> float | None:
    times = [step.get("seconds") for step in result["steps"] if step["kind"] == kind]
    return None if None in times else float(sum(times)) if times else 0.0


def _heldout_loss(result: Mapping[str, Any]) -> float | None:
    """Nats per answer token of the held-out examples after training; None where the model was changed since, or never trained."""
    changes = [step for step in result["steps"] if step["kind"] != "merge"]
    return changes[-1].get("result", {}).get("validation_loss") if changes else None


def _recoveries(result: Mapping[str, Any], dense: Mapping[str, Any] | None) -> dict[str, Interval]:
    """Shares of the dense reference's test ROUGE-L and answer log-likelihood that the row reaches, with paired intervals.

    The log-likelihoods are negative: the share is the dense model's loss per answer token over the row's.
    """
    if dense is None:
        return {}
    mine, theirs = result["splits"]["test"], dense["splits"]["test"]
    if len(mine["answer_nll"]) != len(theirs["answer_nll"]):
        return {}
    found = {"likelihood_recovery": ratio_interval(theirs["answer_nll"], mine["answer_nll"])}
    if "rougeL" in mine["each"] and any(theirs["each"].get("rougeL", ())):
        found["rougeL_recovery"] = ratio_interval(mine["each"]["rougeL"], theirs["each"]["rougeL"])
    return found
