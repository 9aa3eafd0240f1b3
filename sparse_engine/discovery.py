"""Finds plug-ins: importing every module of a package lets each file register what it adds."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Generic, Protocol, TypeVar

from sparse_engine.errors import InputError

__all__ = ["Plugins", "import_all"]


class Named(Protocol):
    """What is known by a name."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def import_all(package: str) -> None:
    """Import every module directly inside ``package``; a file's registration at import makes it known."""
    path = importlib.import_module(package).__path__
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{module}")


class Plugins(Generic[T]):
    """What the files of one package register, by name; the files are imported when something is first asked for.

    Args:
        package: the full name of the package.
        what: what one is, for messages.
    """

    def __init__(self, package: str, what: str) -> None:
        self.known: dict[str, T] = {}
        self._package, self._what, self._imported = package, what, False

    def register(self, plugin: T) -> None:
        """Make ``plugin`` known under its name; called once at the end of its file."""
        self.known[plugin.name] = plugin

    def all(self) -> dict[str, T]:
        """All of them by name, in the order of their files."""
        if not self._imported:
            import_all(self._package)
            self._imported = True
        return dict(self.known)

    def get(self, name: str) -> T:
        """The one called ``name``.

        Raises:
            InputError: there is none.
        """
        known = self.all()
        if name not in known:
            raise InputError(f"unknown {self._what} {name!r}; known: {', '.join(sorted(known))}")
        return known[name]
