"""A checkpoint's model and tokenizer, ready to run: what the command line, evaluation and training load by."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from sparse_engine.checkpoint import Checkpoint
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight

__all__ = ["load_model", "load_tokenizer", "parse_dtype", "quiet_transformers"]

_log = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_dtype(text: str | None) -> torch.dtype | None:
    """The type that ``--dtype`` names; None for None.

    Raises:
        InputError: it is none of bf16, fp16 and fp32.
    """
    if text is None:
        return None
    if text not in _DTYPES:
        raise InputError(f"unknown --dtype {text!r}: use {', '.join(_DTYPES)}")
    return _DTYPES[text]


def quiet_transformers() -> None:
    """Keep transformers' own bars and notices off the terminal: this package reports for itself."""
    from transformers.utils import logging as reports

    reports.set_verbosity_error()  # type: ignore[no-untyped-call]
    reports.disable_progress_bar()  # type: ignore[no-untyped-call]
    # It says at every start on a CPU that it found no faster kernels on the Hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer stored with a checkpoint.

    Raises:
        CheckpointError: the checkpoint itself cannot be used.
        InputError: there is no tokenizer that loads.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
    # transformers reads config.json here too, and fails on a bad one in many ways.
    Checkpoint(path)
    remedy = "copy tokenizer.json and tokenizer_config.json there"
    # Without any vocabulary transformers builds an empty tokenizer instead of failing.
    if not any((path / name).is_file() for name in _VOCABULARIES):
        raise InputError(f"{path} has no tokenizer ({', '.join(_VOCABULARIES)} are all missing); {remedy}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} has a tokenizer that does not load ({reason}); {remedy}") from None


def load_model(path: Path, *, backend: str | None, dtype: torch.dtype | None, device: torch.device) -> Any:
    """A checkpoint's model in evaluation mode: packed linears run packed, a dense checkpoint runs dense.

    Raises:
        InputError: ``backend`` is given for a dense checkpoint.
        CheckpointError: the checkpoint cannot be used.
        KernelUnavailableError: ``backend`` cannot run its layers.
    """
    from sparse_engine.hf import EngineOPTForCausalLM, SparseOPTForCausalLM
    from sparse_engine.hf.quantizer import check_dense, check_kernels, sparse_linears

    quiet_transformers()
    checkpoint = Checkpoint(path)
    if checkpoint.kind == "dense":
        if backend is not None:
            raise InputError(f"{path} is dense and runs on torch's own linear; --backend chooses among kernels for packed checkpoints")
        check_dense(checkpoint)
        # Our reader has refused pickled weights by now; safetensors alone are left to load.
        model: Any = EngineOPTForCausalLM.from_pretrained(path, dtype=dtype or "auto", use_safetensors=True)
        return model.to(device).eval()
    described = (
        (name, PackedWeight(spec.format, 1, spec.pattern, spec.shape, dtype or spec.dtype, {}, spec.value_type))
        for name, spec in checkpoint.packed_layers.items()
    )
    check_kernels(described, backend, {"": device}, option="--device")
    model = SparseOPTForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    # Layers load on the CPU, where the backend may run none; their move chooses kernels again.
    for _, module in sparse_linears(model):
        module.backend = backend
    model = model.to(device).eval()
    slow = [name for name, module in sparse_linears(model) if not module.values.is_meta and module.plan()[0][1].name == "reference"]
    if slow and backend is None:
        _log.warning("the reference kernel runs %d layers, which is slow: `inspect --why %s` says why no other does", len(slow), slow[0])
    return model
