"""The errors that users meet: each is one sentence naming what was wrong, where, and what would work."""

from __future__ import annotations

__all__ = ["CheckpointError", "InputError", "KernelUnavailableError", "SparseEngineError"]


class SparseEngineError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line and exits with 2."""


class InputError(SparseEngineError, ValueError):
    """An argument, option or file that cannot be used as given."""


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, of another architecture, or not safe to load."""


class KernelUnavailableError(SparseEngineError, RuntimeError):
    """No kernel, or not the one asked for, can run a problem on this machine; the message says why."""
