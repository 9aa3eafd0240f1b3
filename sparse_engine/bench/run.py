"""One run of the latency suite: rows measured, written as they come, and shown as a table and a plot."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sparse_engine import native
from sparse_engine.bench import conditions, linear_cpu, linear_gpu
from sparse_engine.bench.environment import environment, write_json
from sparse_engine.bench.suite import Suite, key_of, wrong_field
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.progress import Track, silent

__all__ = ["name_of", "read_results", "run"]

_PREFILL_ROWS = {"cpu": 128, "cuda": 256}
_WRITE_EVERY_S = 5.0
_MUST_MATCH = ("commit", "cpu", "gpu", "torch", "threads")


def name_of(suite: Suite, device: torch.device) -> str:
    """What the results of ``suite`` are called: many activation rows, bound by multiply-adds, have a file of their own."""
    return "linear-prefill" if min(suite.rows) >= _PREFILL_ROWS[device.type] else "linear-decode"


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file.

    Raises:
        InputError: it is missing, no JSON, or a row lacks a field of the schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise InputError(f"{path} is no JSON; delete it and measure again") from None
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or not isinstance(content.get("environment"), dict):
        raise InputError(f"{path} holds no results: it needs an environment and rows")
    for i, row in enumerate(content["rows"]):
        if not isinstance(row, dict) or (wrong := wrong_field(row)) is not None:
            raise InputError(f"{path}: row {i} has no valid {wrong if isinstance(row, dict) else 'form'}")
    return content


def run(
    suite: Suite,
    device: torch.device,
    out: Path,
    *,
    resume: bool = False,
    track: Track = silent,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure ``suite`` on ``device`` and keep ``out`` (a .json file) current; returns what it holds in the end.

    Args:
        resume: keep the rows that ``out`` has already, if they are of the same commit, machine and versions.
        report: called with each row.
        note: called with a sentence for every row that was left out.

    Raises:
        InputError: ``out`` cannot be resumed from.
        KernelUnavailableError: nothing can be measured here, or no kernel but the reference runs a product.
    """
    bench = linear_gpu if device.type == "cuda" else linear_cpu
    if reason := bench.why_unavailable():
        raise KernelUnavailableError(f"the latency suite on {device.type} {reason}")
    described = _environment(device)
    rows = _kept(out, described) if resume and out.exists() else []
    held = {key_of(row) for row in rows}
    contexts = contextlib.ExitStack()
    if device.type == "cuda":
        contexts.enter_context(torch.cuda.device(device))
        measured = linear_gpu.measure(suite, device, held, note)
    else:
        measured = linear_cpu.measure(suite, held, note)
    content = {"environment": described, "rows": rows}
    written = time.monotonic()
    with contexts, torch.inference_mode():
        torch.manual_seed(0)
        try:
            for row in track(_checked(measured), "measuring", len(suite) - len(held)):
                rows.append(row)
                report(row)
                if time.monotonic() - written > _WRITE_EVERY_S:
                    _write(out, content)
                    written = time.monotonic()
        finally:
            if rows:
                _write(out, content)
    if not rows:
        who = "no kernel but the reference runs any" if suite.backend is None else f"backend {suite.backend} runs none"
        raise KernelUnavailableError(f"{who} of the products that were asked for")
    return content


def _checked(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        assert (wrong := wrong_field(row)) is None, f"a row has no valid {wrong}"
        yield row


def _environment(device: torch.device) -> dict[str, Any]:
    described = environment()
    if device.type == "cuda":
        return described | {"timing": linear_gpu.TIMING} | conditions.describe(device)
    busy = described["load_average_1min"] > 0.5
    return described | {
        "gpu": None,
        "isa": native.isa(),
        "last_level_cache_bytes": linear_cpu.last_level_cache_bytes(),
        "warning": "other programs were running: compare minima, not medians" if busy else None,
    }


def _write(out: Path, content: dict[str, Any]) -> None:
    content["environment"] |= {"load_average_1min_after": round(os.getloadavg()[0], 2), **conditions.summary(content["rows"])}
    try:
        write_json(out, content)
    except OSError as error:
        raise InputError(f"the results cannot be written to {out}: {error.strerror or error}") from None


def _kept(out: Path, described: dict[str, Any]) -> list[dict[str, Any]]:
    content = read_results(out)
    for key in _MUST_MATCH:
        if (was := content["environment"].get(key)) != described[key]:
            raise InputError(f"{out} was measured with {key} {was}, now it is {described[key]}; measure anew without --resume")
    rows: list[dict[str, Any]] = content["rows"]
    return rows
