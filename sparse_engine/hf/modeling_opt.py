"""``SparseOPTForCausalLM``: OPT with packed linears, in the place of ``OPTForCausalLM``."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Tokenizer
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTForCausalLM

from sparse_engine import formats, models, pruners, value_types
from sparse_engine.checkpoint import Checkpoint, resolve
from sparse_engine.engine.generation import EngineGeneration
from sparse_engine.errors import CheckpointError, InputError
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.hf.config import SparseOPTConfig
from sparse_engine.hf.quantizer import LayerEntry, SparseEngineConfig, check_kernels, sparse_linears
from sparse_engine.pattern import SparsityPattern
from sparse_engine.pruners.base import Needs, Pruner
from sparse_engine.value_types import PLAIN

__all__ = ["EngineOPTForCausalLM", "SparseOPTForCausalLM"]

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_PACKED_FIELDS = ("quantization_config", "model_type", "head_values")
"""What a packed model's config has of its own."""

_LOADING_OPTIONS = ("dtype", "torch_dtype", "attn_implementation", "_from_auto", "_from_pipeline")
"""Arguments of the loader that a config would swallow as its own fields."""


class EngineOPTForCausalLM(EngineGeneration, OPTForCausalLM):  # type: ignore[no-untyped-call]
    """A dense OPT whose ``generate`` runs in the engine: what the packed model's speed is compared with."""


class SparseOPTForCausalLM(EngineGeneration, OPTForCausalLM):  # type: ignore[no-untyped-call]
    """OPT (Zhang et al. 2022) whose pruned linears stay packed in memory; otherwise used like ``OPTForCausalLM``."""

    config_class = SparseOPTConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        nm: str | None = None,
        sparsity: float | None = None,
        pruner: str = "magnitude",
        values: str | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a packed checkpoint, a compressed-tensors sparse one, or a dense one that is pruned and packed while it loads.

        Args:
            pretrained_model_name_or_path: directory or Hub id with safetensors weights.
            nm: N:M pattern such as "2:4" for a dense checkpoint; weights that have it already are kept bit for bit.
            sparsity: share to remove, unstructured, instead of ``nm``.
            pruner: one that needs no calibration data.
            values: "int8", "fp8" or "int4" quantises the kept weights of a dense checkpoint; None keeps its type.
            backend: force one kernel for all layers; None lets the registry choose.
            **kwargs: as of ``PreTrainedModel.from_pretrained`` (``dtype``, ``device_map``, ``attn_implementation``, ...).

        Raises:
            InputError: ``nm`` or ``sparsity`` is missing for a dense checkpoint or given for a packed one, the pruner needs
                calibration data, or the pattern does not fit.
            CheckpointError: the checkpoint is missing, damaged, pickled, or of another architecture.
            KernelUnavailableError: ``backend`` cannot run this model's layers; raised before weights are read.
        """
        pattern = _pattern(nm, sparsity)
        if pretrained_model_name_or_path is None:
            if pattern is not None or values is not None or backend is not None:
                raise InputError("nm, sparsity, values and backend need a checkpoint; use from_dense for a model in memory")
            return super().from_pretrained(None, *model_args, **kwargs)
        if kwargs.pop("quantization_config", None) is not None:
            raise InputError("packed layers cannot be quantised further; leave quantization_config out")
        hub = {key: kwargs.pop(key) for key in (*_HUB_OPTIONS, "revision", "subfolder") if key in kwargs}
        path = _local(pretrained_model_name_or_path, hub)
        checkpoint = Checkpoint(path)
        if checkpoint.kind != "dense" and (pattern is not None or values is not None):
            raise InputError(f"{path} is packed already; nm, sparsity and values are for dense checkpoints")
        config, kwargs = _config(checkpoint.config, kwargs)
        kwargs["use_safetensors"] = True
        if checkpoint.kind == "sparse_engine":
            declared = {key: value for key, value in checkpoint.config["quantization_config"].items() if key != "backend"}
            config.quantization_config = declared | {"backend": backend}
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        if checkpoint.kind == "dense":
            if pattern is None:
                raise InputError(f"{path} is dense; pass nm='2:4' or sparsity=0.5 to pack it, or load it with OPTForCausalLM")
            chosen = _ready(pruner, path)
            stored = PLAIN if values is None else value_types.quantised(values).name
            _check_backend(checkpoint, config, pattern, stored, backend, kwargs)
            state, entries = _prune(checkpoint.config, checkpoint.names(), checkpoint.tensor, pattern, chosen, stored)
        else:
            state, entries = _repack(checkpoint)
        if kwargs.get("generation_config") is None and (path / "generation_config.json").is_file():
            kwargs["generation_config"] = GenerationConfig.from_pretrained(path)
        return cls._from_state(config, state, entries, backend, *model_args, name=str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_dense(
        cls,
        model: OPTForCausalLM,
        *,
        nm: str | None = None,
        sparsity: float | None = None,
        pruner: str = "magnitude",
        values: str | None = None,
        backend: str | None = None,
    ) -> SparseOPTForCausalLM:
        """A packed copy of a dense model in memory; weights that have the pattern already are kept bit for bit.

        Raises:
            InputError: no pattern is given, the pruner needs calibration data, or the pattern does not fit.
        """
        pattern = _pattern(nm, sparsity)
        if pattern is None:
            raise InputError("from_dense needs nm='2:4' or sparsity=0.5")
        stored = PLAIN if values is None else value_types.quantised(values).name
        settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        weights = model.state_dict()
        state, entries = _prune(settings, weights, weights.__getitem__, pattern, _ready(pruner, "the model"), stored)
        config, _ = _config(settings, {})
        device_map = {"": model.device}
        name = model.config.name_or_path
        packed = cls._from_state(
            config, state, entries, backend, name=name, device_map=device_map, generation_config=model.generation_config
        )
        assert isinstance(packed, cls)
        return packed

    @classmethod
    def _from_state(
        cls,
        config: SparseOPTConfig,
        state: dict[str, Tensor],
        entries: Mapping[str, LayerEntry],
        backend: str | None,
        *model_args: Any,
        name: str | None,
        **kwargs: Any,
    ) -> Any:
        config.quantization_config = SparseEngineConfig({linear: e.to_dict() for linear, e in entries.items()}).to_dict() | {
            "backend": backend
        }
        wanted = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(None, *model_args, config=config, state_dict=state, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := info["missing_keys"]:
            raise CheckpointError(f"{name}: tensor {min(missing)} is missing from the checkpoint")
        model.config.name_or_path = name
        return (model, info) if wanted else model

    def to_dense(self) -> OPTForCausalLM:
        """A plain ``OPTForCausalLM`` with the masked dense weights, which any tool can save, load and train."""
        settings = {key: value for key, value in self.config.to_dict().items() if key not in _PACKED_FIELDS}
        with torch.device("meta"):
            dense = OPTForCausalLM(OPTConfig(**settings))
        state: dict[str, Tensor] = self.state_dict()
        for name, module in sparse_linears(self):
            for part in module.packed.tensors:
                del state[f"{name}.{part}"]
            state[f"{name}.weight"] = module.unpack()
        state = {name: tensor.clone() for name, tensor in state.items()}
        dense.load_state_dict(state, assign=True)
        dense.tie_weights()
        dense.generation_config = copy.deepcopy(self.generation_config)
        dense.train(False)
        return dense

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a packed checkpoint directory: config.json, generation_config.json and safetensors.

        Raises:
            InputError: pickled weights are asked for, or no layer is packed.
        """
        if not kwargs.pop("safe_serialization", True):
            raise InputError("packed checkpoints are written as safetensors only; leave safe_serialization out")
        if not any(True for _ in sparse_linears(self)):
            raise InputError("this model has no packed layer to save; to_dense().save_pretrained() writes a dense checkpoint")
        # From the layers themselves, so that the config cannot disagree with the tensors.
        self.config.quantization_config = SparseEngineConfig.of(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def half(self, *args: Any) -> SparseOPTForCausalLM:
        # The base class refuses to cast quantised models; a SparseLinear knows which of its tensors a cast is for.
        return nn.Module.half(self, *args)

    def float(self, *args: Any) -> SparseOPTForCausalLM:
        return nn.Module.float(self, *args)


def _pattern(nm: str | None, sparsity: float | None) -> SparsityPattern | None:
    if nm is not None and sparsity is not None:
        raise InputError(f"give nm or sparsity, not both (got nm={nm!r} and sparsity={sparsity!r})")
    if nm is not None:
        pattern = SparsityPattern.parse(str(nm))
        if not pattern.is_nm:
            raise InputError(f"nm must be like '2:4', got {nm!r}; sparsity={nm} prunes without groups")
        return pattern
    return None if sparsity is None else SparsityPattern.unstructured(float(sparsity))


def _ready(name: str, source: str | os.PathLike[str]) -> Pruner:
    pruner = pruners.get(name)
    if pruner.needs is not Needs.NOTHING:
        raise InputError(
            f"pruner {name} needs calibration data; run `sparse-engine convert {source} --pruner {name} --calibration ...` "
            "and load what it writes"
        )
    return pruner


def _local(source: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """The local directory of ``source``, downloaded with the loader's Hub options where it is a Hub id."""
    subfolder = hub.pop("subfolder", None) or ""
    revision = hub.pop("revision", None)
    options = {key: value for key, value in hub.items() if value}
    if options and not Path(source).expanduser().is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "merges.txt"]
        options.pop("proxies", None)
        try:
            return Path(snapshot_download(os.fspath(source), revision=revision, allow_patterns=patterns, **options)) / subfolder
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{source} is no local directory and could not be had from the Hub ({reason})") from None
    return resolve(source, revision) / subfolder


def _config(settings: Mapping[str, Any], kwargs: dict[str, Any]) -> tuple[SparseOPTConfig, dict[str, Any]]:
    """The model's config and the arguments that it did not take: those that name a field of the config override it."""
    given = kwargs.pop("config", None)
    if isinstance(given, OPTConfig):
        settings = given.to_dict()
    held = {key: kwargs.pop(key) for key in _LOADING_OPTIONS if key in kwargs}
    fields = {key: copy.deepcopy(value) for key, value in settings.items() if key not in ("quantization_config", "model_type")}
    config, unused = SparseOPTConfig.from_dict(fields, return_unused_kwargs=True, **kwargs)
    return config, unused | held


def _check_backend(
    checkpoint: Checkpoint,
    config: SparseOPTConfig,
    pattern: SparsityPattern,
    value_type: str,
    backend: str | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Refuse a backend that cannot run the model before minutes are spent on pruning."""
    family, fmt = checkpoint.family, formats.for_pattern(pattern)
    linears = family.linears(checkpoint.config)
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
    if dtype == "auto":
        dtype = config.dtype or checkpoint.spec(f"{linears[0]}.weight")[1]
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype not in VALUE_DTYPES:
        return  # The loader names the types that it takes.
    shapes = ((linear, family.linear_shape(checkpoint.config, linear)) for linear in linears)
    described = ((linear, PackedWeight(fmt.name, fmt.version, pattern, shape, dtype, {}, value_type)) for linear, shape in shapes)
    check_kernels(described, backend, kwargs.get("device_map"))


def _prune(
    settings: Mapping[str, Any],
    names: Iterable[str],
    tensor: Callable[[str], Tensor],
    pattern: SparsityPattern,
    pruner: Pruner,
    value_type: str,
) -> tuple[dict[str, Tensor], dict[str, LayerEntry]]:
    """Prune and pack the decoder linears one at a time; the other tensors pass through."""
    settings = dict(settings)
    family = models.for_config(settings)
    linears = set(family.linears(settings))
    for linear in sorted(linears):
        pattern.check_shape(family.linear_shape(settings, linear), linear)
    fmt = formats.for_pattern(pattern)
    state: dict[str, Tensor] = {}
    entries: dict[str, LayerEntry] = {}
    for name in names:
        linear, _, part = name.rpartition(".")
        if linear in linears and part == "weight":
            weight, mask = pruner.prune(tensor(name), None, pattern, layer=linear)
            entries[linear] = _add(state, linear, fmt.pack(weight, mask, linear, value_type))
        elif not family.drops(settings, name):
            state[name] = tensor(name)
    return state, entries


def _repack(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, LayerEntry]]:
    """The tensors of a checkpoint that stores its packed linears in another way."""
    state: dict[str, Tensor] = {}
    for name in checkpoint.names():
        linear, _, part = name.rpartition(".")
        packed_part = linear in checkpoint.packed_layers and part != "bias"
        if not packed_part and not checkpoint.family.drops(checkpoint.config, name):
            state[name] = checkpoint.tensor(name)
    return state, {linear: _add(state, linear, checkpoint.packed(linear)) for linear in checkpoint.packed_layers}


def _add(state: dict[str, Tensor], linear: str, packed: PackedWeight) -> LayerEntry:
    state |= {f"{linear}.{part}": tensor for part, tensor in packed.tensors.items()}
    return LayerEntry.of(packed)


AutoModelForCausalLM.register(SparseOPTConfig, SparseOPTForCausalLM)
AutoTokenizer.register(SparseOPTConfig, GPT2Tokenizer)  # type: ignore[no-untyped-call]
