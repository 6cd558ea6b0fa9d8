from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import minids_kernels
import pytest
import torch

from minids import corpus, doctor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIDS_CACHE", str(tmp_path))
    return tmp_path


def test_the_facts_are_json_and_match_the_machine(cache, capsys):
    facts = doctor.doctor()
    assert json.loads(json.dumps(facts)) == facts
    version = facts["versions"]["torch"]["version"]
    assert torch.__version__ in (version, f"{version}+{torch.__version__.partition('+')[2]}")  # wheels may not say
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert len(facts["machine"]["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    output = capsys.readouterr()
    assert output.out == "" and version in output.err
    for line in facts["advice"]:
        assert line in output.err


def test_every_public_op_is_listed_once_and_references_are_not(cache):
    ops = doctor.kernels()
    expected = [n for n in minids_kernels.__all__ if callable(getattr(minids_kernels, n)) and "reference" not in n]
    assert list(ops) == expected
    assert all(kinds[0] == "torch" for kinds in ops.values())


def test_a_triton_kernel_in_an_op_module_is_noticed(cache, monkeypatch):
    class Kernel:
        """Stands in for triton.runtime.jit.JITFunction."""

    Kernel.__module__ = "triton.runtime.jit"
    module = sys.modules[minids_kernels.swiglu.__module__]
    before = doctor.kernels()["swiglu"]
    monkeypatch.setattr(module, "_swiglu_kernel", Kernel(), raising=False)
    assert doctor.kernels()["swiglu"] == ["torch", "triton"]
    assert before == ["torch"] or "triton" in before


def test_missing_packages_give_advice_instead_of_errors(cache, monkeypatch):
    def gone(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", gone)
    monkeypatch.setattr(doctor, "_module", lambda name: None)
    monkeypatch.setattr(doctor, "_installed", lambda name: False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: (_ for _ in ()).throw(OSError("no such disk")))
    facts = doctor.doctor()
    assert facts["kernels"] is None and facts["dtype"] == {} and facts["machine"]["free_disk_bytes"] is None
    advice = "\n".join(facts["advice"])
    assert "torch is missing: pip install torch==2.13.0" in advice
    assert "minids_kernels cannot be imported" in advice
    assert "matplotlib not installed" in advice and ".[plot]" in advice
    assert all(package.name in advice for package in corpus.PACKAGES)


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.13.0+cpu", "tested"), ("2.13.5", "tested"), ("2.14.0a0", "newer"), ("2.11", "older"), ("2.9.1", "too old"),
     ("3", "newer"), ("unknown", "too old")],
)  # fmt: skip
def test_version_states(monkeypatch, version, state):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    assert doctor.versions()["torch"]["state"] == state


def test_gpus_are_listed_with_their_capability(cache, monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA H800", 9, 0, 80 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert doctor.machine(torch)["gpus"] == [{"name": "NVIDIA H800", "capability": "9.0", "memory_bytes": 80 << 30}]


def test_cached_wheels_are_not_missing(cache):
    for package in corpus.PACKAGES:
        (cache / package.wheel).touch()
    facts = doctor.doctor()
    assert facts["quickstart"] == {"cache": str(cache), "missing": []}
    assert not any("download" in line for line in facts["advice"])


def test_versions_agree_with_the_packaging_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = dict(re.findall(r"^(\w+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    oldest = dict(re.findall(r"(\w+)>=([\d.]+)", "\n".join(project["dependencies"])))
    for name, versions in doctor.VERSIONS.items():
        assert versions == (oldest[name], constraints[name])
    extras = project["optional-dependencies"]
    assert set(doctor.EXTRAS) <= set(extras)
    assert ".".join(map(str, doctor.OLDEST_PYTHON)) in project["requires-python"]
