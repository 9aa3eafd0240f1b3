"""Several pruning and training stages at a time on one device: small models leave most of a GPU idle while their kernels are launched.

Each stage is a process of its own (``python -m sparse_engine.study``), started once what it needs is finished. Evaluation is not run
here, since its times must not be shared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import typer

from sparse_engine.errors import InputError, SparseEngineError
from sparse_engine.study.graph import Graph, Stage
from sparse_engine.study.recipe import Row
from sparse_engine.study.stages import Stages

__all__ = ["find_stage", "prepare"]

_POLL_S = 0.2


def prepare(graph: Graph, stages: Stages, rows: Iterable[Row], source: str, jobs: int) -> None:
    """Make the checkpoints of ``rows``, ``jobs`` stages at a time; the output of each goes to ``<stages>/<stage>.log``.

    Args:
        source: the recipe as the command line named it, which the processes load again.

    Raises:
        SparseEngineError: a stage failed; the others under way are stopped, and go on from their last checkpoint when run again.
    """
    waiting = {stage.folder: (stage, row) for row in rows for stage in _ancestry(graph.checkpoint(row)) if not stages.has(stage)}
    total, running = len(waiting), dict[str, subprocess.Popen[bytes]]()
    stages.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        while waiting or running:
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    log = stages.folder / f"{name}.log"
                    raise SparseEngineError(f"{name} failed with exit code {process.returncode}: {_last_line(log)} ({log} has it all)")
                done = total - len(waiting) - len(running)
                typer.echo(f"{name} is ready, {done} of {total} stages, {time.monotonic() - started:.0f} s", err=True)
            ready = [n for n, (stage, _) in waiting.items() if all(s.model is not None or stages.has(s) for s in stage.inputs.values())]
            for name in ready[: jobs - len(running)]:
                running[name] = _start(*waiting.pop(name), stages, source, jobs)
            time.sleep(_POLL_S)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(stage: Stage, row: Row, stages: Stages, source: str, jobs: int) -> subprocess.Popen[bytes]:
    # Together the processes have as many threads as the machine has cores.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
    command = [sys.executable, "-m", "sparse_engine.study", source, row.id, stage.folder, str(stages.folder.parent), str(stages.device)]
    with (stages.folder / f"{stage.folder}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)  # noqa: S603


def _ancestry(stage: Stage) -> list[Stage]:
    """The stage after all that it needs."""
    if stage.model is not None:
        return []
    return [*(found for needed in stage.inputs.values() for found in _ancestry(needed)), stage]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


def find_stage(graph: Graph, row: str, folder: str) -> Stage:
    """The stage in ``folder`` among those that a row's checkpoint needs; the models of other rows are not looked at.

    Raises:
        InputError: there is none.
    """
    if row in graph.recipe.rows:
        for stage in _ancestry(graph.checkpoint(graph.recipe.rows[row])):
            if stage.folder == folder:
                return stage
    raise InputError(f"the recipe has no stage {folder} of row {row}: it was changed since the study began")
