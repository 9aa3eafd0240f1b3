"""Options of the latency suites, and the rows they leave: written to bench/results once the session ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from opt_shapes import HIDDEN
from reporting import device_name, environment, write_results


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparse-engine benches")
    group.addoption("--models", default="opt-125m,opt-1.3b,opt-6.7b", help=f"comma-separated, of {', '.join(HIDDEN)}")
    group.addoption("--m", default="1,2,4,8", help="comma-separated numbers of activation rows")
    group.addoption("--values", default="bf16,fp32", help="comma-separated value types")
    group.addoption("--seconds", type=float, default=1.0, help="time to spend on each product")
    group.addoption("--device-name", help="folder of the results; default: after this machine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for option in ("models", "m", "values"):
        name = option.removesuffix("s") if option == "models" else option
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, metafunc.config.getoption(f"--{option}").split(","), scope="session")


@pytest.fixture(scope="session")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Rows of bench/results/<device>/linear-decode.json, written when all products have been measured."""
    before = environment()
    collected: list[dict[str, Any]] = []
    yield collected
    if collected:
        after = {
            "load_average_1min_after": round(os.getloadavg()[0], 2),
            "busy": before["load_average_1min"] > 0.5 * torch.get_num_threads(),
        }
        write_results(collected[0].pop("device", None) or device_name(), "linear-decode", before | after, collected)
