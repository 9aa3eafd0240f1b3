"""The ``sparse-engine`` command. One file in this package adds one subcommand; a new file is found by itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparse_engine.discovery import import_all

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the request cannot be met (one line on standard error says why), 130 interrupted."""
    from sparse_engine.cli.app import run

    try:
        import_all(__name__)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run(arguments))
