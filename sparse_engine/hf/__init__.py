"""The drop-in for transformers: ``SparseOPTForCausalLM``, its config, and the loader of packed checkpoints.

Importing this package registers the config alone, which is quick; the model and the quantiser, whose bases take transformers
seconds to import, follow when a config is first made or one of them is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_engine.hf.config import SparseOPTConfig

if TYPE_CHECKING:
    from sparse_engine.hf.modeling_opt import EngineOPTForCausalLM, SparseOPTForCausalLM
    from sparse_engine.hf.quantizer import SparseEngineConfig, SparseEngineQuantizer

__all__ = ["EngineOPTForCausalLM", "SparseEngineConfig", "SparseEngineQuantizer", "SparseOPTConfig", "SparseOPTForCausalLM"]


def __getattr__(name: str) -> Any:
    if name in ("EngineOPTForCausalLM", "SparseOPTForCausalLM"):
        from sparse_engine.hf import modeling_opt

        return getattr(modeling_opt, name)
    if name in ("SparseEngineConfig", "SparseEngineQuantizer"):
        from sparse_engine.hf import quantizer

        return getattr(quantizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
