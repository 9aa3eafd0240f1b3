"""Fixtures of the CPU kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cpu_products import LEVELS

from sparse_engine import native


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_isa(request.param)
    yield request.param
    native.set_isa(None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The fp64 references are tiny; on a busy machine torch's own threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
