"""PyTorch's semi-structured product as a kernel: its reasons to refuse on any machine, its product and layout on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_engine import SparseLinear, SparseOPTForCausalLM, formats, registry
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Problem

NAME = "torch_semi_structured"
TWO_FOUR = SparsityPattern.nm(2, 4)
GOOD = Problem("nm", TWO_FOUR, torch.bfloat16, "cuda", 768, 3072, 1, (9, 0))
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_packed(rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> PackedWeight:
    """A random 2:4 weight with zero groups, groups of one non-zero, and -0.0."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    keep = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1).argsort(-1) < 2
    weight.view(rows, -1, 4)[:, ::3] = 0.0
    weight.view(rows, -1, 4)[:, 1::5, :2] = -0.0
    return formats.get("nm").pack(weight.to(dtype), Mask(TWO_FOUR, keep.view(rows, columns))).to(device)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu", "capability": None}, "runs on cuda, not cpu"),
        ({"dtype": torch.float32}, "has no float32 form"),
        ({"format": "unstructured", "pattern": SparsityPattern.unstructured(0.5)}, "reads format nm, not unstructured"),
        ({"pattern": SparsityPattern.nm(4, 8)}, "multiplies 2:4 only, not 4:8"),
        ({"capability": (7, 5)}, "needs compute capability 8.0 for sparse tensor cores, not 7.5"),
        ({"out_features": 760}, "needs sizes that are multiples of 16, not 760x3072"),
        ({"in_features": 3076}, "needs sizes that are multiples of 16, not 768x3076"),
    ],
)
def test_rejects_with_a_reason(change: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    kernel = registry.get(NAME)
    assert kernel.rejects(GOOD) is None
    assert kernel.rejects(replace(GOOD, **change)) == reason


def test_rejects_a_torch_without_cusparselt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert registry.get(NAME).rejects(GOOD) == "needs cuSPARSELt, which this build of torch lacks"


@pytest.mark.parametrize("rows", registry.ROW_BUCKETS)
def test_is_preferred_to_unpacking(rows: int) -> None:
    problem = GOOD.with_rows(rows)
    assert 0 < registry.get(NAME).cost(problem) < registry.get("reference").cost(problem)


def test_every_configuration_is_an_algorithm_and_a_split() -> None:
    kernel = registry.get(NAME)
    for capability in ((8, 0), (9, 0)):
        configs = kernel.configs(replace(GOOD, capability=capability))
        assert len(set(configs)) == len(configs)
        assert configs[0] == (0, 1, -1), "torch's default comes first"
    with pytest.raises(InputError, match="three whole numbers"):
        kernel.run_config(torch.zeros(1, 16), {"compressed": torch.zeros(1), "bitmask": torch.zeros(16, 2)}, None, TWO_FOUR, ())


@pytest.mark.gpu
def test_configurations_that_cusparselt_takes_give_the_product() -> None:
    packed = make_packed(768, 1536, torch.bfloat16, "cuda")
    kernel = registry.get(NAME)
    layout = kernel.prepare(packed)
    dense = formats.get("nm").unpack(packed).double()
    x = torch.randn(5, 1536, dtype=torch.bfloat16, device="cuda")
    ran = 0
    for config in kernel.configs(Problem.of(packed, 5)):
        try:
            got = kernel.run_config(x, layout, None, TWO_FOUR, config)
        except RuntimeError:
            continue
        ran += 1
        want = x.double() @ dense.T
        assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[torch.bfloat16], config
    assert ran > 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 7, 16, 17, 129])
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (768, 768), (3072, 768), (512, 2048)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_product(dtype: torch.dtype, shape: tuple[int, int], rows: int) -> None:
    packed = make_packed(*shape, dtype, "cuda")
    kernel = registry.get(NAME)
    layout = kernel.prepare(packed)
    dense = formats.get("nm").unpack(packed).double()
    x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
    strided = torch.randn(2, rows, 2 * shape[1], dtype=dtype, device="cuda")[..., ::2]
    for bias in (None, torch.randn(shape[0], dtype=dtype, device="cuda")):
        for activations in (x, strided):
            want = torch.nn.functional.linear(activations.double(), dense, None if bias is None else bias.double())
            # Freed memory full of NaN is what the allocator hands out next: an element never written shows.
            torch.full_like(want, float("nan"), dtype=dtype)
            got = kernel.run(activations, layout, bias, TWO_FOUR)
            assert got.shape == want.shape
            assert float((got.double() - want).norm() / want.norm()) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 16), (48, 80), (3072, 768)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_layout_gives_back_the_packed_weight(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    packed = make_packed(*shape, dtype, "cuda")
    kernel = registry.get(NAME)
    described = replace(packed, tensors={})
    recovered = kernel.recover(kernel.prepare(packed), described)
    assert recovered.tensors.keys() == packed.tensors.keys()
    for name, tensor in packed.tensors.items():
        assert torch.equal(recovered.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.gpu
def test_operator_registration() -> None:
    packed = make_packed(32, 64, torch.bfloat16, "cuda")
    layout = registry.get(NAME).prepare(packed)
    x, bias = (torch.randn(*size, dtype=torch.bfloat16, device="cuda") for size in ((3, 64), (32,)))
    arguments = (x, layout["compressed"], layout["bitmask"], bias)
    torch.library.opcheck(torch.ops.sparse_engine.torch_semi_structured_linear.default, arguments)


@pytest.mark.gpu
def test_layer_releases_and_recovers_its_packed_tensors() -> None:
    packed = make_packed(256, 512, torch.bfloat16)
    layer = SparseLinear.from_packed(packed, torch.randn(256).bfloat16(), backend=NAME).cuda()
    layer.plan()
    assert layer.values.numel() == 0
    saved = layer.state_dict()
    back = layer.packed.to("cpu")
    for name, tensor in packed.tensors.items():
        assert torch.equal(saved[name].cpu(), tensor)
        assert torch.equal(back.tensors[name], tensor)
    x = torch.randn(3, 512, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


def _generate(model: torch.nn.Module, ids: Tensor, **options: object) -> Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **options)


@pytest.mark.gpu
def test_model_loads_generates_and_saves(tiny_opt: Path, tmp_path: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(tiny_opt, nm="2:4", backend=NAME, dtype=torch.float16, device_map="cuda")
    ids = torch.randint(4, 300, (2, 9), device="cuda")
    dense = model.to_dense()
    with torch.no_grad():
        got, want = model(input_ids=ids).logits.double(), dense(input_ids=ids).logits.double()
    assert float((got - want).norm() / want.norm()) < 1e-2
    assert _generate(model, ids, cache_implementation="static").shape == (2, 21)
    model.save_pretrained(tmp_path)
    again = SparseOPTForCausalLM.from_pretrained(tmp_path)
    for name, tensor in again.to_dense().state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name].cpu()), name
