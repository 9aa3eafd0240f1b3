"""The demo: the checkpoint and bills that ship with the package, pruned, packed and compared with dense on this machine."""

from __future__ import annotations
