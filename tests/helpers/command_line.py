"""What a run of the command line leaves behind."""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str
