"""The model that training starts from: dense fp32 weights of any checkpoint, the masks it carries, or a quantised base."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_engine import formats, pruners
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.checkpoint.writer import copy_side_files
from sparse_engine.errors import InputError, KernelUnavailableError
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

__all__ = ["load_dense", "load_quantised", "masks_of"]


def masks_of(checkpoint: Checkpoint) -> dict[str, Mask]:
    """The mask of every pruned linear by name; empty for a dense checkpoint.

    Masked dense weights (``convert --format dense``) are known by their manifest; a group in which a kept weight is zero is
    filled up to N from its zeros, as packing does.
    """
    found: dict[str, Mask] = {}
    for name in checkpoint.packed_layers:
        packed = checkpoint.packed(name)
        found[name] = Mask(packed.pattern, formats.get(packed.format).keep(packed))
    if checkpoint.kind == "dense":
        for name, entry in (checkpoint.manifest or {}).get("layers", {}).items():
            weight, pattern = checkpoint.weight(name), SparsityPattern.parse(entry["pattern"])
            if pattern.is_nm:
                found[name] = pruners.get("magnitude").prune(weight, None, pattern, layer=name)[1]
            else:
                found[name] = Mask(pattern, weight != 0)
    return found


def load_dense(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """An ``OPTForCausalLM`` with the checkpoint's (masked) dense weights in ``dtype`` on the CPU."""
    from transformers import OPTForCausalLM

    from sparse_engine.hf.quantizer import check_dense

    checkpoint = Checkpoint(path)
    if checkpoint.kind == "dense":
        check_dense(checkpoint)
        return OPTForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
    from sparse_engine.hf import SparseOPTForCausalLM

    return SparseOPTForCausalLM.from_pretrained(path, dtype=dtype).to_dense()


def load_quantised(path: Path, bits: int, device: torch.device) -> Any:
    """The checkpoint's model with its decoder linears quantised by bitsandbytes: LLM.int8 (Dettmers et al. 2022) or 4-bit NF4.

    Both map 0 to 0 exactly, so a masked weight stays zero.

    Raises:
        InputError: bitsandbytes is not installed, or does not run on ``device``.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError(
            f"a {bits}-bit base needs bitsandbytes (pip install 'sparse-engine[train]'); --bits 0 trains adapters over an unquantised base"
        ) from None
    from transformers import BitsAndBytesConfig, OPTForCausalLM

    # Otherwise it says with every single product on a CPU that fp32 inputs are cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    compute = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    quantised = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )
    # The trainer's check that a quantised model lies on its device knows GPUs by number.
    place = (device.index or 0) if device.type == "cuda" else "cpu"
    with _dense_directory(path) as dense:
        try:
            model = OPTForCausalLM.from_pretrained(
                dense, quantization_config=quantised, dtype=compute, device_map={"": place}, use_safetensors=True
            )
        except (RuntimeError, NotImplementedError, ImportError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise KernelUnavailableError(
                f"bitsandbytes cannot quantise to {bits} bits on {device} ({reason}); use --device cuda, or --bits 0"
            ) from error
    # What peft records as the base and looks in for a config when it saves.
    model.name_or_path = model.config.name_or_path = str(path)
    return model


@contextmanager
def _dense_directory(path: Path) -> Iterator[Path]:
    checkpoint = Checkpoint(path)
    if checkpoint.kind == "dense":
        from sparse_engine.hf.quantizer import check_dense

        check_dense(checkpoint)
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dense"
        load_dense(path, torch.bfloat16 if _is_bf16(path) else torch.float32).save_pretrained(folder)
        copy_side_files(path, folder)
        yield folder


def _is_bf16(path: Path) -> bool:
    checkpoint = Checkpoint(path)
    return all(spec.dtype is torch.bfloat16 for spec in checkpoint.packed_layers.values())


def linears_of(model: nn.Module, masks: dict[str, Mask]) -> dict[str, nn.Linear]:
    """The masked linears of a dense model by name.

    Raises:
        InputError: the model has no such linear.
    """
    found = {}
    for name in masks:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise InputError(f"{name} is a {type(module).__name__}, where a mask needs a dense linear")
        found[name] = module
    return found
