"""Options of the subcommands that read example pairs."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["SummaryColumn", "TextColumn"]

TextColumn = Annotated[str, typer.Option("--text-column", help="Column with the documents.")]
SummaryColumn = Annotated[str, typer.Option("--summary-column", help="Column with the summaries.")]
