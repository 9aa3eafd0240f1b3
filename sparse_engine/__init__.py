"""sparse-engine: prune OPT language models, pack them, and run them packed."""

from __future__ import annotations

__all__ = ["Mask", "PackedWeight", "SparseLinear", "SparsityPattern"]
__version__ = "0.1.0"

from sparse_engine.formats.base import PackedWeight
from sparse_engine.linear import SparseLinear
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
