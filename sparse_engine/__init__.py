"""sparse-engine: prune OPT language models, pack them, and run them packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["EngineOPTForCausalLM", "Mask", "PackedWeight", "SparseLinear", "SparseOPTConfig", "SparseOPTForCausalLM", "SparsityPattern"]
__version__ = "0.1.0"

from sparse_engine.formats.base import PackedWeight
from sparse_engine.hf.config import SparseOPTConfig
from sparse_engine.linear import SparseLinear
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

if TYPE_CHECKING:
    from sparse_engine.hf.modeling_opt import EngineOPTForCausalLM, SparseOPTForCausalLM


def __getattr__(name: str) -> Any:
    # The model classes take transformers seconds to import, so they wait for their first use.
    if name in ("EngineOPTForCausalLM", "SparseOPTForCausalLM"):
        from sparse_engine.hf import modeling_opt

        return getattr(modeling_opt, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
