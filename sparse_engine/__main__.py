"""``python -m sparse_engine``: the command line without the installed script."""

from __future__ import annotations

from sparse_engine.cli import main

main()
