"""``SparseLinear``: a linear layer whose weight stays packed, run by the kernel that the registry chose for each number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine import formats, plan, registry
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight, stack
from sparse_engine.levels import TokenLevels, relu_bound
from sparse_engine.pattern import SparsityPattern
from sparse_engine.policy import Policy
from sparse_engine.value_types import PLAIN

__all__ = ["SparseLinear"]


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W (out_features, in_features) packed; x is (..., in_features), y (..., out_features).

    The buffers carry the names and shapes of the packed checkpoint (``values``, ``bitmask``, ``row_offsets``, ``scales``), so a state
    dict loads as it is. Deliberately no ``nn.Linear`` and no ``weight``: code that would merge into or read a dense weight
    fails instead of silently losing its change.

    Args:
        nnz: stored values, needed for an unstructured pattern only.
        dtype: of x, y and the bias, and of the values where they are plain.
        value_type: how values are stored (:mod:`sparse_engine.value_types`); quantised ones and their scales stay as they are when the
            module is cast to another type.
        backend: force one kernel by name; None lets the registry choose per number of rows.
        dense: "auto", "never" or "always", whether a dense copy may be kept where it was measured to be faster; None takes the
            environment variable SPARSE_ENGINE_DENSE, else "auto" (:mod:`sparse_engine.policy`).

    Raises:
        InputError: the pattern does not fit the shape.
    """

    values: Tensor
    bitmask: Tensor
    scales: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pattern: SparsityPattern,
        *,
        bias: bool = True,
        nnz: int | None = None,
        dtype: torch.dtype = torch.float32,
        value_type: str = PLAIN,
        device: torch.device | str | None = None,
        backend: str | None = None,
        dense: str | None = None,
    ) -> None:
        super().__init__()
        pattern.check_shape((out_features, in_features), "SparseLinear")
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.backend, self.dense = pattern, backend, dense
        self.format, self.value_type, self.dtype = formats.for_pattern(pattern), value_type, dtype
        for name, spec in self.format.specs((out_features, in_features), pattern, dtype, nnz, value_type).items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        self._plan: tuple[tuple[int, registry.Kernel, registry.Layout], ...] | None = None
        self._layout_owner: registry.Kernel | None = None
        self._relu_bound: Tensor | None = None
        self._without: frozenset[str] = frozenset()

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: Tensor | None = None, *, backend: str | None = None, dense: str | None = None
    ) -> SparseLinear:
        """Wrap a packed weight (sharing its tensors) and an optional bias (out_features,)."""
        rows, columns = packed.shape
        stored: dict[str, Any] = {"nnz": packed.nnz, "dtype": packed.dtype, "value_type": packed.value_type}
        module = cls(columns, rows, packed.pattern, bias=bias is not None, device="meta", backend=backend, dense=dense, **stored)
        for name, tensor in packed.tensors.items():
            setattr(module, name, tensor)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @property
    def packed(self) -> PackedWeight:
        """The weight in its neutral form (rebuilt from the kernel's own layout where that replaced it)."""
        if self._layout_owner is not None and self._plan is not None:
            return self._layout_owner.recover(self._plan[0][2], self.described)
        return replace(self.described, tensors=dict(self.named_buffers(recurse=False)))

    @property
    def described(self) -> PackedWeight:
        """The packed weight without its tensors."""
        shape = (self.out_features, self.in_features)
        return PackedWeight(self.format.name, self.format.version, self.pattern, shape, self.dtype, {}, self.value_type)

    @property
    def nbytes(self) -> int:
        """Bytes of weight tensors held now: packed tensors and every kernel's layout, each storage once; the bias is not counted."""
        held = list(self.buffers(recurse=False))
        for _, _, layout in self._plan or ():
            held += layout.values()
        return sum({(t.device, t.data_ptr()): t.numel() * t.element_size() for t in held}.values())

    def problem(self, rows: int = 1) -> registry.Problem:
        return registry.Problem.of(self.described, rows, self.values.device)

    def plan(self) -> tuple[tuple[int, registry.Kernel, registry.Layout], ...]:
        """Choose kernels for every bucket of rows and prepare their layouts; done once, at the first forward at the latest.

        Raises:
            KernelUnavailableError: the forced backend, or every kernel, rejects this layer.
        """
        if self._plan is None:
            packed = self.packed
            policy = Policy.here(packed.tensors["values"].device, self.dense)
            steps: list[tuple[int, registry.Kernel, registry.Layout]] = []
            layouts: dict[str, registry.Layout] = {}
            for step in plan.kernels_for(registry.Problem.of(packed, 1), self.backend, policy, without=self._without):
                kernel = step.kernel
                if kernel.name not in layouts:
                    layouts[kernel.name] = kernel.prepare(packed)
                if steps and steps[-1][1] is kernel:
                    steps.pop()
                steps.append((step.rows, kernel, layouts[kernel.name]))
            used = [kernel for _, kernel, _ in steps]
            if not any(kernel.in_place for kernel in used):
                self._layout_owner = used[0]
                for name in packed.tensors:
                    # Emptied, not deleted: the module keeps its buffer names, type and device.
                    setattr(self, name, getattr(self, name).new_empty(0))
            norms = (kernel.relu_norm(layout) for _, kernel, layout in steps)
            self._relu_bound = next((relu_bound(norm, self.bias) for norm in norms if norm is not None), None)
            self._plan = tuple(steps)
        return self._plan

    def forward(self, x: Tensor) -> Tensor:
        kernel, layout = self._chosen(x.numel() // self.in_features)
        return kernel.run(x, layout, self.bias, self.pattern)

    def fused(self, x: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """``forward``, then ReLU, then + ``residual`` (..., out_features), in the kernel's epilogue where it has one."""
        kernel, layout = self._chosen(x.numel() // self.in_features)
        return kernel.run_fused(x, layout, self.bias, self.pattern, relu=relu, residual=residual)

    def levels_at(self, rows: int) -> torch.dtype | None:
        """The type of the 8-bit levels that so many rows of x are made into, which :meth:`of_levels` takes ready made; None: no levels."""
        kernel, layout = self._chosen(rows)
        return kernel.levels_of(layout)

    def of_levels(self, tokens: TokenLevels, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        """:meth:`fused` of the x that ``tokens`` stand for, of the type that :meth:`levels_at` gives for their number."""
        kernel, layout = self._chosen(len(tokens))
        return kernel.run_levels(tokens, layout, self.bias, self.pattern, relu=relu, residual=residual)

    def relu_bound(self, rows: int) -> Tensor | None:
        """The :func:`~sparse_engine.levels.relu_bound` of :meth:`relu_levels` where that takes so many rows; None: it does not.

        Found with the plan: it does not see a bias that is changed in place behind that.
        """
        kernel, layout = self._chosen(rows)
        return self._relu_bound if kernel.leaves_levels(layout, rows, self.dtype) else None

    def relu_levels(self, tokens: TokenLevels) -> TokenLevels:
        """ReLU of y as levels, of x as levels whose ``ahead`` are by :meth:`relu_bound`."""
        kernel, layout = self._chosen(len(tokens))
        return kernel.relu_levels(tokens, layout, self.bias, self.pattern)

    def _chosen(self, rows: int) -> tuple[registry.Kernel, registry.Layout]:
        steps = self._plan
        if steps is None:
            steps = self.plan()
        for limit, kernel, layout in steps:
            if rows <= limit:
                return kernel, layout
        return steps[-1][1], steps[-1][2]

    @classmethod
    def stacked(cls, parts: Sequence[SparseLinear]) -> SparseLinear | None:
        """One layer with the outputs of ``parts`` (same input, pattern and type) side by side; None where its kernel cannot share.

        The parts then read their weights from its layout, so that nothing is held twice. They go on working, and a move or cast of a
        part gives it its own weight again.
        """
        first = parts[0]
        alike = [(p.in_features, p.pattern, p.dtype, p.value_type, p.backend, p.dense, p.values.device, p.bias is None) for p in parts]
        if len(set(alike)) > 1:
            return None
        bias = None if first.bias is None else torch.cat([part.bias.detach() for part in parts if part.bias is not None])
        whole = cls.from_packed(stack([part.packed for part in parts]), bias, backend=first.backend, dense=first.dense)
        # One product in a decode step is worth more than a prompt's by a library whose layout cannot be cut.
        whole._without = frozenset(name for name, kernel in registry.all_kernels().items() if not kernel.in_place and not kernel.has_rows)
        steps = whole.plan()
        plans: list[tuple[tuple[int, registry.Kernel, registry.Layout], ...]] = []
        begin = 0
        for part in parts:
            end = begin + part.out_features
            views = [(limit, kernel, kernel.rows_of(layout, begin, end)) for limit, kernel, layout in steps]
            if any(view is None for _, _, view in views):
                return None
            plans.append(tuple((limit, kernel, view) for limit, kernel, view in views if view is not None))
            begin = end
        for part, steps_of_part in zip(parts, plans, strict=True):
            part._plan, part._layout_owner = steps_of_part, whole._layout_owner
            for name in part.packed_names:
                setattr(part, name, getattr(part, name).new_empty(0))
        return whole

    @property
    def packed_names(self) -> list[str]:
        """Names of the buffers that hold the packed weight."""
        return [name for name, _ in self.named_buffers(recurse=False)]

    def unpack(self) -> Tensor:
        """The masked dense weight (out_features, in_features)."""
        return self.format.unpack(self.packed)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        # A move or cast invalidates the layouts: go back to the neutral tensors first. A layer that had a plan gets its new one
        # here, since a compiled model's next forward is traced and kernels cannot be chosen and prepared while tracing.
        planned = self._plan is not None
        if self._layout_owner is not None:
            for name, tensor in self.packed.tensors.items():
                setattr(self, name, tensor)
        self._plan, self._layout_owner = None, None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        stored = dict(self.named_buffers(recurse=False)) if self.value_type != PLAIN else {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                # A cast is for activations and bias; what is stored keeps its type, and so its exact values.
                setattr(self, name, tensor.to(moved.device))
        if planned and not self.values.is_meta:
            self.plan()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._layout_owner is not None:
            destination.update({prefix + name: tensor for name, tensor in self.packed.tensors.items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._layout_owner is not None:
            raise InputError(
                "weights cannot be loaded into a SparseLinear whose kernel layout replaced its packed tensors; build a new module"
            )
        self._plan = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, pattern={self.pattern}, dtype={self.dtype}, values={self.value_type}, backend={self.backend or 'auto'}"
