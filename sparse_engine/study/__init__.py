"""The study in one command: recipes, cached stages, rows, and the report."""

from __future__ import annotations

__all__: list[str] = []
