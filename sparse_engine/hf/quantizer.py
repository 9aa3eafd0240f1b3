"""How transformers builds a packed model: named linears become ``SparseLinear`` before the weights load, and are checked after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_engine import formats, models, registry, value_types
from sparse_engine.checkpoint import Checkpoint
from sparse_engine.errors import CheckpointError, InputError, KernelUnavailableError
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.linear import SparseLinear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.value_types import PLAIN

__all__ = [
    "QUANT_METHOD",
    "VERSION",
    "LayerEntry",
    "SparseEngineConfig",
    "SparseEngineQuantizer",
    "check_dense",
    "check_kernels",
    "sparse_linears",
]

QUANT_METHOD = "sparse_engine"
VERSION = 1
_KEYS = {"quant_method", "version", "layers", "backend"}
_LAYER_KEYS = {"format", "pattern", "nnz", "values", "dtype"}
_WEIGHT_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in VALUE_DTYPES}
_MODULE_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True, slots=True)
class LayerEntry:
    """What config.json says of one packed linear.

    ``nnz`` (stored values) only where the pattern does not give it; ``dtype``, the type that a quantised weight stands for, only where
    ``value_type`` is not the plain one. A model is loaded in the loader's type whatever that is.
    """

    format: str
    pattern: SparsityPattern
    nnz: int | None = None
    value_type: str = PLAIN
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, packed: PackedWeight) -> LayerEntry:
        nnz = None if packed.pattern.is_nm else packed.nnz
        return cls(packed.format, packed.pattern, nnz, packed.value_type, None if packed.value_type == PLAIN else packed.dtype)

    @classmethod
    def read(cls, name: Any, entry: Any) -> LayerEntry:
        """Validate one item of ``layers``.

        Raises:
            CheckpointError: it is malformed; the message names the layer and what is wrong.
        """
        if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
            raise CheckpointError(f"quantization_config.layers: {name!r} is no module name such as model.decoder.layers.0.fc1")
        where = f"quantization_config.layers[{name!r}]"
        if not isinstance(entry, Mapping) or not {"format", "pattern"} <= entry.keys() <= _LAYER_KEYS:
            raise CheckpointError(f'{where} must be like {{"format": "nm", "pattern": "2:4"}}, got {entry!r}')
        try:
            pattern = SparsityPattern.parse(str(entry["pattern"]))
            fmt = formats.get(str(entry["format"]))
            value_type = value_types.get(str(entry.get("values", PLAIN))).name
        except InputError as error:
            raise CheckpointError(f"{where}: {error}") from None
        if not fmt.accepts(pattern):
            raise CheckpointError(f"{where}: format {fmt.name} does not hold pattern {pattern}")
        nnz = entry.get("nnz")
        if not pattern.is_nm and (isinstance(nnz, bool) or not isinstance(nnz, int) or nnz < 0):
            raise CheckpointError(f"{where} needs nnz, its whole number of stored values, got {nnz!r}")
        dtype = None if value_type == PLAIN else _WEIGHT_DTYPES.get(str(entry.get("dtype")))
        if value_type != PLAIN and dtype is None:
            raise CheckpointError(f"{where} needs dtype, one of {', '.join(_WEIGHT_DTYPES)}, got {entry.get('dtype')!r}")
        return cls(fmt.name, pattern, None if pattern.is_nm else nnz, value_type, dtype)

    def to_dict(self) -> dict[str, Any]:
        described: dict[str, Any] = {"format": self.format, "pattern": str(self.pattern)}
        if self.nnz is not None:
            described["nnz"] = self.nnz
        if self.dtype is not None:
            described |= {"values": self.value_type, "dtype": str(self.dtype).removeprefix("torch.")}
        return described


@register_quantization_config(QUANT_METHOD)
class SparseEngineConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint.

    Args:
        layers: linear name → {"format": "nm", "pattern": "2:4"} or {"format": "unstructured", "pattern": "0.5", "nnz": 1234}, with
            "values": "int8" and "dtype": "bfloat16" where they are quantised.
        version: of this layout.
        backend: forces one kernel for all layers; a choice of the loading program, never saved.

    Raises:
        CheckpointError: a key is unknown, the version is not 1, or a layer's entry is malformed.
    """

    def __init__(self, layers: Mapping[str, Any] | None = None, version: Any = VERSION, backend: str | None = None, **others: Any) -> None:
        if unknown := others.keys() - _KEYS:
            raise CheckpointError(f"quantization_config has the unknown key {min(unknown)!r}; known: {', '.join(sorted(_KEYS))}")
        if version != VERSION or isinstance(version, bool):
            raise CheckpointError(f"the checkpoint is packed in version {version!r}; this release reads version {VERSION}")
        if not isinstance(layers, Mapping) or not layers:
            raise CheckpointError("quantization_config.layers must name at least one packed linear")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment] # an enum of transformers' own methods
        self.version = VERSION
        self.layers = {name: LayerEntry.read(name, entry) for name, entry in layers.items()}
        self.backend = backend

    @classmethod
    def of(cls, model: nn.Module) -> SparseEngineConfig:
        """Describe the packed linears that ``model`` holds now.

        Raises:
            CheckpointError: it holds none.
        """
        layers = {name: LayerEntry.of(module.packed).to_dict() for name, module in sparse_linears(model)}
        return cls(layers)

    def to_dict(self) -> dict[str, Any]:
        layers = {name: entry.to_dict() for name, entry in self.layers.items()}
        return {"quant_method": self.quant_method, "version": self.version, "layers": layers}


@register_quantizer(QUANT_METHOD)
class SparseEngineQuantizer(HfQuantizer):
    """Builds the packed linears on the meta device from headers that were checked, and validates what was loaded into them."""

    requires_calibration = False
    quantization_config: SparseEngineConfig

    def __init__(self, quantization_config: SparseEngineConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError(
                "a dense checkpoint is not packed by quantization_config=; use SparseOPTForCausalLM.from_pretrained(..., nm='2:4') "
                "or `sparse-engine convert`"
            )

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        _devices(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in VALUE_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in VALUE_DTYPES)
            raise InputError(f"a packed model cannot be loaded as {str(dtype).removeprefix('torch.')}; choose dtype from {names}")
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        config = self.quantization_config
        backend = config.backend
        settings = model.config.to_dict()
        family = models.for_config(settings)
        known = set(family.linears(settings))
        for name, entry in config.layers.items():
            if name not in known:
                raise CheckpointError(f"quantization_config.layers names {name!r}, which is no prunable linear of this model")
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise CheckpointError(f"{name} is a {type(linear).__name__}, where a packed checkpoint replaces an nn.Linear")
            try:
                packed = SparseLinear(
                    linear.in_features,
                    linear.out_features,
                    entry.pattern,
                    bias=linear.bias is not None,
                    nnz=entry.nnz,
                    dtype=dtype or linear.weight.dtype,
                    value_type=entry.value_type,
                    device="meta",
                    backend=backend,
                )
            except InputError as error:
                raise CheckpointError(f"{name}: {error}") from None
            model.set_submodule(name, packed)
        if checkpoint_files:
            _check_headers(model, Checkpoint(Path(checkpoint_files[0]).parent))
        check_kernels(((name, module.described) for name, module in sparse_linears(model)), backend, device_map)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, module in sparse_linears(model):
            if module.values.is_meta:
                raise InputError(f"{name} was offloaded, which packed layers do not support; give a device_map without cpu or disk offload")
            packed = module.packed
            module.format.check(packed, name)
            if packed.value_type == PLAIN and not bool(torch.isfinite(packed.tensors["values"]).all()):
                raise CheckpointError(f"{name}.values holds NaN or infinite values as {str(packed.dtype).removeprefix('torch.')}")
            module.plan()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(sparse_linears(model)):
            weight = module.unpack()
            with torch.device("meta"):
                linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight = nn.Parameter(weight.to(dtype or weight.dtype), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.detach().to(dtype or weight.dtype), requires_grad=False)
            model.set_submodule(name, linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def sparse_linears(model: nn.Module) -> Iterable[tuple[str, SparseLinear]]:
    """The packed linears of ``model`` with their names, in the model's order."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SparseLinear))


def _devices(device_map: Any) -> list[torch.device]:
    """The devices that ``device_map`` can put layers on, the CPU where there is none.

    Raises:
        InputError: it offloads to disk.
    """
    if device_map is None:
        return [torch.device("cpu")]
    if isinstance(device_map, Mapping):
        if "disk" in device_map.values():
            raise InputError("packed layers cannot be offloaded to disk; give a device_map of devices with memory enough")
        return list({torch.device(place) for place in device_map.values()})
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return [torch.device("cuda" if torch.cuda.is_available() else "cpu")]
    return [torch.device(device_map)]


def check_dense(checkpoint: Checkpoint) -> None:
    """Compare a dense checkpoint's headers with its config: transformers would fill up what is missing at random.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or type than the config implies.
    """
    settings = OPTConfig(**checkpoint.family.dense_config(checkpoint.config))
    with torch.device("meta"):
        _check_headers(OPTForCausalLM(settings), checkpoint)


def _check_headers(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Compare every tensor that the model needs with the files' headers, before anything is allocated.

    Raises:
        CheckpointError: one is missing, or has another shape or type than the config implies.
    """
    expected: dict[str, Tensor] = model.state_dict()
    quantised = ((name, module) for name, module in sparse_linears(model) if module.value_type != PLAIN)
    exact = {f"{name}.{part}" for name, module in quantised for part in module.packed_names}
    settings = model.config.to_dict()
    for name, tensor in expected.items():
        if checkpoint.family.drops(settings, name):
            continue
        shape, dtype = checkpoint.spec(name)
        castable = tensor.is_floating_point() and name not in exact
        same_kind = dtype in VALUE_DTYPES if castable else dtype == tensor.dtype
        if shape != tuple(tensor.shape) or not same_kind:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {dtype} {shape}, where config.json implies "
                f"{'a floating type' if castable else tensor.dtype} {tuple(tensor.shape)}"
            )


def check_kernels(layers: Iterable[tuple[str, PackedWeight]], backend: str | None, device_map: Any, *, option: str = "device_map=") -> None:
    """Ask the registry for every kernel that :meth:`SparseLinear.plan` will want, before weights are read or pruned.

    Args:
        layers: names and descriptions; their tensors are not looked at.
        option: what the caller's user chooses the device by.

    Raises:
        InputError: no kernel has the forced backend's name, or ``device_map`` offloads to disk.
        KernelUnavailableError: it, or every kernel, rejects a layer.
    """
    asked: set[registry.Problem] = set()
    devices = _devices(device_map)
    for name, described in layers:
        for device in devices:
            for rows in registry.ROW_BUCKETS:
                problem = registry.Problem.of(described, rows, device)
                if problem in asked:
                    continue
                asked.add(problem)
                try:
                    registry.select(problem, backend)
                except KernelUnavailableError as error:
                    hint = f"; {option} chooses the device that the model loads onto" if backend else ""
                    raise KernelUnavailableError(f"{name} on {device}: {error}{hint}") from None
