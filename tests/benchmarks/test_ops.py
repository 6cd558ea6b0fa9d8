"""Every room's module in benchmarks/ops: it has cases on a CPU, ours is right in the small ones, and what the tuner may
write into a launch table fits that table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from minids_kernels import _launch

from benchmarks.protocol import OURS, judge, precision, sizes
from benchmarks.run import OPS

CPU = torch.device("cpu")
CONFIGS = Path(_launch.__file__).parent / "configs"
OPTIONS = {"num_warps", "num_stages", "maxnreg"}
VARIANTS = {"BY_HAND", "TMA", "SWAP", "PARTS", "STAGES"}  # which kernel is launched, and its pipeline


def module(op: str) -> Any:
    return importlib.import_module(f"benchmarks.ops.{op}")


@pytest.mark.parametrize("op", OPS)
def test_ours_is_right_in_the_small_cases(op: str) -> None:
    cases = module(op).cases(CPU, True)
    assert cases
    for case in cases:
        torch.manual_seed(0)
        inputs = case.make()
        contestant = case.contestants[OURS]
        verdict = judge(contestant.read(contestant.bind(inputs)()), case.reference(inputs), case.tolerance)
        assert not verdict.reason, case.label


@pytest.mark.parametrize("op", OPS)
def test_labels_of_cases_differ(op: str) -> None:
    """Results are found by them."""
    labels = [case.label for case in module(op).cases(CPU, False)]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("op", [op for op in OPS if (CONFIGS / f"{op}.json").is_file()])
def test_candidates_are_configs_of_their_tables(op: str) -> None:
    """A candidate sets the very arguments that the entry in use sets, or those of a launch that may become one, but for
    options that have defaults. Where descriptors are in use, pointers are tried beside them."""
    table = json.loads((CONFIGS / f"{op}.json").read_text())
    tuning = module(op).tuning(CPU)
    assert tuning and set(tuning) <= set(table)
    for kernel, tuned in tuning.items():
        used = [entry["config"] for chip in table[kernel].values() for entry in chip]
        used += getattr(module(op), "BY_HAND", [])
        known = {frozenset(set(config) - OPTIONS - VARIANTS) for config in used}
        for entry in _launch.entries(op, kernel, "sm_90"):
            candidates = list(tuned.candidates(entry["shape"]))
            assert candidates, entry
            for candidate in candidates:
                assert frozenset(set(candidate) - OPTIONS - VARIANTS) in known, (kernel, candidate)
            forms = {candidate.get("TMA", False) for candidate in candidates}
            assert forms == {True, False} or "TMA" not in entry["config"], (kernel, entry)


def test_sizes_by_device() -> None:
    gpu, cpu, small = [(1,), (2,)], [(3,), (4,)], (5,)
    cuda = torch.device("cuda")
    assert sizes(cuda, False, gpu, cpu, small) == gpu and sizes(cuda, True, gpu, cpu, small) == [(1,)]
    assert sizes(CPU, False, gpu, cpu, small) == cpu and sizes(CPU, True, gpu, cpu, small) == [(5,)]
    assert precision(cuda) == torch.bfloat16 and precision(CPU) == torch.float32
