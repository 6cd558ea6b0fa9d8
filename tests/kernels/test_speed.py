"""A small case of each op, ours and eager, for `pytest --benchmark-enable tests/kernels/test_speed.py`; without that
option each runs once. The figures to quote come from benchmarks.run."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from benchmarks.protocol import OURS, judge
from benchmarks.run import OPS


@pytest.mark.parametrize("contestant", [OURS, "eager"])
@pytest.mark.parametrize("op", OPS)
def test_speed(op: str, contestant: str, benchmark: Any) -> None:
    module = importlib.import_module(f"benchmarks.ops.{op}")
    if not hasattr(module, "cases"):
        pytest.skip("the op has no cases to time")
    case = module.cases(torch.device("cpu"), quick=True)[0]
    if contestant not in case.contestants:
        pytest.skip("the op has no such contestant")
    inputs = case.make()
    entry = case.contestants[contestant]
    benchmark.group = f"{op} {case.label}"
    output = benchmark(entry.bind(inputs))
    assert judge(entry.read(output), case.reference(inputs), case.tolerance).reason == ""
