"""How long work reports itself: a bar with time left on a terminal, plain lines elsewhere, nothing in library use."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Track", "console_track", "silent"]

T = TypeVar("T")

_LINE_EVERY_S = 10.0


class Track(Protocol):
    """Wraps an iterable of ``total`` items so that going through it is reported under ``description``."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterator[T]: ...


def silent(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Reports nothing: the default in library use."""
    yield from items


def console_track(items: Iterable[T], description: str, total: int, *, stream: TextIO | None = None) -> Iterator[T]:
    """A rich progress bar with time left where ``stream`` (default: standard error) is a terminal, else a line every ten seconds."""
    stream = stream or sys.stderr
    if stream.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(file=stream)) as bar:
            yield from bar.track(items, total=total, description=description)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S or done + 1 == total:
            last = now
            left = (now - started) / (done + 1) * (total - done - 1)
            print(f"{description}: {done + 1}/{total}, {now - started:.0f} s, about {left:.0f} s left", file=stream, flush=True)
