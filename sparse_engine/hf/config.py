"""The config of a packed OPT model, registered with transformers under its own ``model_type``."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.opt.configuration_opt import OPTConfig

from sparse_engine.errors import CheckpointError

__all__ = ["SparseOPTConfig"]


@strict
class SparseOPTConfig(OPTConfig):  # type: ignore[no-untyped-call]
    """OPTConfig with ``model_type`` "sparse_opt"; ``quantization_config`` names the packed linears.

    Not "opt": transformers without this package would skip the unknown quantiser and give the packed linears random
    weights in silence, where an unknown model type makes it refuse.
    """

    model_type = "sparse_opt"

    head_values: str | None = None
    """ "int8": the decode step on a processor multiplies by an int8 copy of the output head, with a scale for each token of the vocabulary.
    All else, and the checkpoint, has the head as it is."""

    def __post_init__(self, **kwargs: Any) -> None:
        # Every loader makes a config before it looks for a model or a quantiser, so this is early enough to register both,
        # and `import sparse_engine` is spared the import of the modeling code.
        import sparse_engine.hf.modeling_opt  # noqa: F401 - registers at import

        if self.head_values not in (None, "int8"):
            raise CheckpointError(f"head_values is {self.head_values!r} in the model's config: it is int8 or null")
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


AutoConfig.register(SparseOPTConfig.model_type, SparseOPTConfig)
