"""Options and steps that several subcommands share."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from sparse_engine.errors import InputError, KernelUnavailableError

__all__ = [
    "Backend",
    "Device",
    "Dtype",
    "Regime",
    "parse_device",
    "parse_rows",
    "regime_rows",
    "seed_option",
    "size_text",
    "split_list",
]

_MOST_ROWS = 1 << 16

Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; default: the checkpoint's own.", metavar="TYPE")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Backend = Annotated[
    str | None, typer.Option("--backend", help="Force one kernel by name; default: the fastest that fits (see `inspect --why`).")
]

Regime = Annotated[str, typer.Option("--regime", help="decode: 1 to 128 activation rows, or prefill: 256 to 8192.")]


def regime_rows(name: str) -> list[int]:
    """The activation rows of a regime of the latency suite.

    Raises:
        InputError: there is no such regime.
    """
    from sparse_engine.bench.suite import REGIMES

    if name not in REGIMES:
        raise InputError(f"unknown --regime {name!r}: use {' or '.join(REGIMES)}")
    return list(REGIMES[name])


def seed_option(what: str) -> Any:
    """``--seed``, in the range that every generator of random numbers takes."""
    return typer.Option("--seed", min=0, max=2**32 - 1, help=what)


def split_list(given: list[str] | None) -> list[str]:
    """The values of a repeatable option, each of which may itself be a list with commas."""
    return [part.strip() for text in given or () for part in text.split(",") if part.strip()]


def parse_rows(given: list[str] | None) -> list[int]:
    """Numbers of activation rows from a repeatable option.

    Raises:
        InputError: one is no whole number from 1 to 65536.
    """
    texts = split_list(given)
    for text in texts:
        if not text.isdecimal() or not 1 <= int(text) <= _MOST_ROWS:
            raise InputError(f"--rows takes whole numbers from 1 to {_MOST_ROWS}, not {text!r}")
    return [int(text) for text in texts]


def parse_device(text: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        InputError: it names none, or one of another kind than cpu and cuda.
        KernelUnavailableError: torch sees no such GPU.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"unknown --device {text!r}: use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {text} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KernelUnavailableError(f"--device {text} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def size_text(nbytes: float) -> str:
    """A number of bytes as text, in KiB, MiB or GiB."""
    unit, name = (2**30, "GiB") if nbytes >= 2**30 else (2**20, "MiB") if nbytes >= 2**20 else (2**10, "KiB")
    return f"{nbytes / unit:.2f} {name}"
