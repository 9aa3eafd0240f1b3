"""Options and steps that several subcommands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from sparse_engine.errors import InputError, KernelUnavailableError

__all__ = [
    "Backend",
    "Device",
    "Dtype",
    "Regime",
    "load_model",
    "load_tokenizer",
    "parse_device",
    "parse_dtype",
    "parse_rows",
    "quiet_transformers",
    "regime_rows",
    "size_text",
    "split_list",
]

_MOST_ROWS = 1 << 16
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32; default: the checkpoint's own.", metavar="TYPE")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Backend = Annotated[
    str | None, typer.Option("--backend", help="Force one kernel by name; default: the fastest that fits (see `inspect --why`).")
]

Regime = Annotated[str, typer.Option("--regime", help="decode: 1 to 128 activation rows, or prefill: 256 to 8192.")]


def regime_rows(name: str) -> list[int]:
    """The activation rows of a regime of the latency suite."""
    from sparse_engine.bench.suite import REGIMES

    if name not in REGIMES:
        raise InputError(f"unknown --regime {name!r}: use {' or '.join(REGIMES)}")
    return list(REGIMES[name])


def parse_dtype(text: str | None) -> torch.dtype | None:
    if text is None:
        return None
    if text not in _DTYPES:
        raise InputError(f"unknown --dtype {text!r}: use {', '.join(_DTYPES)}")
    return _DTYPES[text]


def split_list(given: list[str] | None) -> list[str]:
    """The values of a repeatable option, each of which may itself be a list with commas."""
    return [part.strip() for text in given or () for part in text.split(",") if part.strip()]


def parse_rows(given: list[str] | None) -> list[int]:
    """Numbers of activation rows from a repeatable option."""
    texts = split_list(given)
    for text in texts:
        if not text.isdecimal() or not 1 <= int(text) <= _MOST_ROWS:
            raise InputError(f"--rows takes whole numbers from 1 to {_MOST_ROWS}, not {text!r}")
    return [int(text) for text in texts]


def parse_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise InputError(f"unknown --device {text!r}: use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {text} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KernelUnavailableError(f"--device {text} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def quiet_transformers() -> None:
    """Keep transformers' own bars and notices off the terminal: this command line reports for itself."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer stored with a checkpoint.

    Raises:
        InputError: there is none that loads.
    """
    from transformers import AutoTokenizer

    quiet_transformers()
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
    from sparse_engine.checkpoint import Checkpoint
    from sparse_engine.hf import EngineOPTForCausalLM, SparseOPTForCausalLM

    quiet_transformers()
    dense = Checkpoint(path).kind == "dense"
    if dense and backend is not None:
        raise InputError(f"{path} is dense and runs on torch's own linear; --backend chooses among kernels for packed checkpoints")
    if dense:
        # Our reader has refused pickled weights by now; safetensors alone are left to load.
        model: Any = EngineOPTForCausalLM.from_pretrained(path, dtype=dtype or "auto", use_safetensors=True)
    else:
        model = SparseOPTForCausalLM.from_pretrained(path, backend=backend, dtype=dtype or "auto")
    return model.to(device).eval()


def size_text(nbytes: float) -> str:
    """A number of bytes as text, in KiB, MiB or GiB."""
    unit, name = (2**30, "GiB") if nbytes >= 2**30 else (2**20, "MiB") if nbytes >= 2**20 else (2**10, "KiB")
    return f"{nbytes / unit:.2f} {name}"
