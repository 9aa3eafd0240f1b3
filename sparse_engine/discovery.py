"""Finds plug-ins: importing every module of a package lets each file register what it adds."""

from __future__ import annotations

import importlib
import pkgutil

__all__ = ["import_all"]


def import_all(package: str) -> None:
    """Import every module directly inside ``package``; a file's registration at import makes it known."""
    path = importlib.import_module(package).__path__
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{module}")
