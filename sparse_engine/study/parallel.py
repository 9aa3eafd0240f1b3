"""Stages of a study in processes of their own: several at a time on each GPU where they train, one on each where they are measured.

Small models leave most of a GPU idle while their kernels are launched, so that pruning and training gain from company, which a
measured time must not have. A process (``python -m sparse_engine.study``) sees one GPU alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import typer

from sparse_engine.errors import InputError, SparseEngineError
from sparse_engine.study.graph import Graph, Stage
from sparse_engine.study.recipe import Row
from sparse_engine.study.stages import Stages

__all__ = ["evaluate_apart", "find_stage", "prepare", "visible_gpus"]

_POLL_S = 0.2


def visible_gpus(device: torch.device) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each GPU that this process sees; empty where stages run on a CPU."""
    if device.type != "cuda":
        return []
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def prepare(graph: Graph, stages: Stages, rows: Iterable[Row], source: str, jobs: int) -> dict[str, str]:
    """Make the checkpoints of ``rows``, ``jobs`` stages at a time over the visible GPUs; a stage's output goes to ``<stages>/<stage>.log``.

    A stage that fails stops only those that need it.

    Args:
        source: the recipe as the command line named it, which the processes load again.

    Returns:
        Why each failed stage failed, by its folder's name.
    """
    waiting = {stage.folder: (stage, row) for row in rows for stage in _ancestry(graph.checkpoint(row)) if not stages.has(stage)}
    total, failed = len(waiting), dict[str, str]()
    gpus = visible_gpus(stages.device)
    stages.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _stopped_together() as running:
        places = dict[str, str | None]()
        while waiting or running:
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name], places[name]
                if process.returncode:
                    log = stages.folder / f"{name}.log"
                    failed[name] = f"{name} failed with exit code {process.returncode}: {_last_line(log)} ({log} has it all)"
                    typer.echo(failed[name], err=True)
                    continue
                done = total - len(waiting) - len(running) - len(failed)
                typer.echo(f"{name} is ready, {done} of {total} stages, {time.monotonic() - started:.0f} s", err=True)
            ready = [n for n, (stage, _) in waiting.items() if all(map(stages.made, stage.inputs.values()))]
            for name in ready[: jobs - len(running)]:
                stage, row = waiting.pop(name)
                places[name] = _least_busy(gpus, places.values())
                arguments = ["stage", source, str(stages.folder.parent), str(stages.device), row.id, stage.folder]
                running[name] = _start(arguments, stages.folder / f"{name}.log", places[name], jobs)
            if not ready and not running:
                break  # what is left needs a stage that failed
            time.sleep(_POLL_S)
    return failed


def evaluate_apart(stages: Stages, rows: Sequence[str], source: str, gpus: Sequence[str]) -> None:
    """Run the evaluations of ``rows``, each GPU one after the other of its share; output goes to ``<stages>/evaluate-<gpu>.log``.

    Raises:
        SparseEngineError: an evaluation failed.
    """
    with _stopped_together() as running:
        for index, gpu in enumerate(gpus):
            if share := rows[index :: len(gpus)]:
                arguments = ["evaluate", source, str(stages.folder.parent), str(stages.device), *share]
                running[gpu] = _start(arguments, stages.folder / f"evaluate-{gpu}.log", gpu, len(gpus))
                typer.echo(f"GPU {gpu} evaluates {', '.join(share)}", err=True)
        for gpu, process in running.items():
            if process.wait():
                log = stages.folder / f"evaluate-{gpu}.log"
                raise SparseEngineError(f"evaluating on GPU {gpu} failed with exit code {process.returncode}: {_last_line(log)}")


@contextmanager
def _stopped_together() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes that end with the block, and with this process where it is told to end."""
    running = dict[str, subprocess.Popen[bytes]]()

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    # Only the main thread may say what a signal does.
    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if mine else None
    try:
        yield running
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        if mine:
            signal.signal(signal.SIGTERM, before)


def _least_busy(gpus: Sequence[str], busy: Iterable[str | None]) -> str | None:
    count = Counter(busy)
    return min(gpus, key=lambda gpu: count[gpu]) if gpus else None


def _start(arguments: list[str], log: Path, gpu: str | None, jobs: int) -> subprocess.Popen[bytes]:
    # Together the processes have as many threads as the machine has cores.
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} | os.environ
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    command = [sys.executable, "-m", "sparse_engine.study", *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)  # noqa: S603


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
