"""The product with an int8 output head: the kernel and its stand-in against float64, and generation that uses it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoding import small_opt
from products import relative_error

from sparse_engine.engine.choice import Choice
from sparse_engine.engine.generation import VARIABLE
from sparse_engine.engine.kernels.int8 import int8_linear, most_rows
from sparse_engine.engine.product import Int8Product, int8_head
from sparse_engine.engine.runner import Runner, runner_for
from sparse_engine.errors import InputError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (323, 256), (5027, 768), (50, 5120), (40, 80)])
def test_product(rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    values = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    values[0, :8] = torch.tensor([-128, 127, 0, -1, 1, -127, 64, -64])
    scales = torch.rand(rows) + 0.01
    for m in (1, 3, 8, 9, 16, 33, 64, 130):
        x = torch.randn(m, columns).to(dtype)
        expected = x.double() @ (values.double() * scales.double()[:, None]).T
        found = int8_linear(x.to(device), values.to(device), scales.to(device))
        assert found.shape == (m, rows)
        assert relative_error(found, expected.to(device)) < TOLERANCE[dtype], m


def test_shared_memory_bounds_the_rows() -> None:
    assert [most_rows(columns, 232448) for columns in (768, 2048, 4096, 5120, 9216)] == [64, 32, 16, 16, 8]
    assert most_rows(1 << 15, 232448) == 0


def test_wrong_arguments_are_refused() -> None:
    values, scales = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4)
    with pytest.raises(InputError, match=r"\(M, K\) by \(V, K\)"):
        int8_linear(torch.zeros(2, 32), values, scales)
    with pytest.raises(InputError, match="scales is"):
        int8_linear(torch.zeros(2, 64), values, scales[:3])
    with pytest.raises(InputError, match=r"values is torch\.int16"):
        int8_linear(torch.zeros(2, 64), values.short(), scales)


@pytest.mark.gpu
def test_generation_with_an_int8_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "engine")
    model = small_opt("2:4").to("cuda").eval()
    exact = copy.deepcopy(model)
    head = int8_head(model.lm_head.weight)
    exact.lm_head.weight = torch.nn.Parameter((head["values"].float() * head["scales"][:, None]).to(model.dtype))
    model.config.head_values = "int8"
    runner, plain = runner_for(model), runner_for(exact)
    assert isinstance(runner, Runner)
    assert isinstance(plain, Runner)
    assert isinstance(runner.weights.head, Int8Product)
    ids = torch.randint(4, 300, (5, 21), generator=torch.Generator().manual_seed(1)).cuda()
    for batch in (1, 5):
        found: list[Any] = []
        for one in (runner, plain):
            session = one.session(batch, 40, Choice(), eos=[], pad=1)
            session.admit(range(batch), list(ids[:batch]), [40] * batch)
            session.cache.state.tokens.fill_(7)
            found.append(one.logits(session.cache).clone())
        assert relative_error(found[0], found[1].double()) < 2e-2
    assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[0] == 5
    assert model.generate(ids[:1], max_new_tokens=8, do_sample=False).shape[0] == 1
    assert model.generation_path == "engine (cuda graphs)"
