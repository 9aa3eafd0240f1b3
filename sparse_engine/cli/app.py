"""The application that subcommands join, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

import sparse_engine
from sparse_engine.errors import SparseEngineError

__all__ = ["app", "run"]

app = typer.Typer(
    name="sparse-engine",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparse-engine {sparse_engine.__version__}")
        raise typer.Exit


@app.callback(epilog="Example: sparse-engine convert facebook/opt-125m --nm 2:4 --calibration c4")
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Prune OPT language models, pack them, and run them packed: smaller on disk and in memory, and faster."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code, reporting every user's error as one line."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="sparse-engine", standalone_mode=False)
        sys.stdout.flush()
    except typer.Abort:
        code = 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `| head`; what is left to flush at exit has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SparseEngineError as error:
        return _fail(str(error))
    except torch.cuda.OutOfMemoryError as error:
        return _fail(f"the GPU has too little free memory ({str(error).partition('. ')[0]}); try --device cpu")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except Exception as error:
        # The command-line library's own errors (unknown option, missing argument), whose class differs between its versions.
        if not hasattr(error, "format_message"):
            raise
        return _fail(f"{error.format_message().rstrip('.')}. See --help.")
    if code == 130:
        typer.echo("sparse-engine: interrupted", err=True)
    return int(code or 0)


def _fail(message: str) -> int:
    typer.echo("sparse-engine: " + " ".join(message.split()), err=True)
    return 2
