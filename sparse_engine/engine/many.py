"""Continuous batching: a list of prompts through a batch whose finished rows leave while new ones enter (Yu et al. 2022, "Orca")."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sparse_engine.engine.choice import Choice
from sparse_engine.engine.runner import Runner, Session, runner_for
from sparse_engine.errors import InputError
from sparse_engine.progress import Track, silent

__all__ = ["AUTO_ROWS", "Stop", "auto_batch", "generate_many"]

Stop = Callable[[list[int]], int | None]
"""Given a row's new tokens, how many of them to keep because it has ended, or None while it goes on."""

AUTO_ROWS = {"cuda": 64, "cpu": 16}
"""Most rows that an automatic batch has: more add little throughput and take memory."""

_STEPS = 8
"""Steps between two looks at which rows have finished."""


def auto_batch(runner: Runner, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Rows that the device has memory for, at most :data:`AUTO_ROWS` of its kind and as many as there are prompts."""
    w, most = runner.weights, min(AUTO_ROWS.get(runner.device.type, 1), len(prompts))
    if runner.device.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(runner.device)
    free += torch.cuda.memory_reserved(runner.device) - torch.cuda.memory_allocated(runner.device)
    tokens = max(map(len, prompts)) + max_new_tokens
    row = 2 * len(w.layers) * tokens * w.hidden * runner.dtype.itemsize
    return int(max(1, min(most, free // 2 // row)))


@torch.no_grad()
def generate_many(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int | None = None,
    choice: Choice | None = None,
    stop: Stop | None = None,
    track: Track = silent,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and with its EOS token, in the order of ``prompts``.

    Args:
        batch: rows at once; None takes what :func:`auto_batch` says.
        choice: how tokens are chosen; greedy by default.
        stop: asked now and then about each row's new tokens; those beyond what it keeps are dropped.

    Raises:
        InputError: the engine cannot run the model, a prompt is empty, or it leaves no room for a new token.
    """
    runner = runner_for(model, forced=True)
    if isinstance(runner, str):
        raise InputError(f"the engine cannot run this model: it {runner}")
    if not prompts:
        return []
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < runner.max_positions:
            raise InputError(f"prompt {index} has {len(prompt)} tokens; the model takes 1 to {runner.max_positions - 1} and a new one")
    rows = min(len(prompts), batch or auto_batch(runner, prompts, max_new_tokens))
    capacity = min(max(map(len, prompts)) + max_new_tokens, runner.max_positions + 1)
    config = model.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else model.config.eos_token_id
    eos = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    session = runner.session(rows, capacity, choice or Choice(), eos=eos, pad=int(model.config.pad_token_id or 0))
    found = dict(track(_finished(session, rows, prompts, max_new_tokens, stop), "generating", len(prompts)))
    return [found[index] for index in range(len(prompts))]


def _finished(
    session: Session, rows: int, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Stop | None
) -> Iterator[tuple[int, list[int]]]:
    """(index, new tokens) of each prompt as it ends."""
    waiting, running = deque(range(len(prompts))), dict[int, int]()
    device, positions = session.runner.device, session.runner.max_positions
    while waiting or running:
        free = [row for row in range(rows) if row not in running]
        # The prompts' pass holds the others up, so that it waits for a few.
        if waiting and (len(free) >= max(1, rows // 8) or len(free) >= len(waiting) or not running):
            entering = {row: waiting.popleft() for row in free[: len(waiting)]}
            texts = [torch.tensor(list(prompts[index]), device=device) for index in entering.values()]
            session.admit(list(entering), texts, [min(len(text) + max_new_tokens, positions + 1) for text in texts])
            running |= entering
        for _ in range(_STEPS):
            session.step()
        state = session.state
        finished, filled = state.finished.tolist(), state.filled.tolist()
        watched = [row for row in running if finished[row] or stop is not None]
        if not watched:
            continue
        history = state.history[watched, : max(filled[row] for row in watched)].cpu()
        ended = []
        for row, tokens in zip(watched, history, strict=True):
            index = running[row]
            new = tokens[len(prompts[index]) : filled[row]].tolist()
            keep = None if stop is None else stop(new)
            if finished[row] or keep is not None:
                yield index, new[:keep]
                del running[row]
                if not finished[row]:
                    ended.append(row)
        if ended:
            state.finished[ended] = True
