from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize("has_triton", [True, False])
def test_every_op_is_listed_and_runs_triton_where_it_is_installed(cache, monkeypatch, has_triton):
    """Those that are made of others, too; references, types, modules and `precompile` are no ops."""
    monkeypatch.setattr(minids_kernels._launch, "HAS_TRITON", has_triton)
    ops = doctor.kernels()
    others = {n for n in minids_kernels.__all__ if n.endswith("_reference")} | {"MoePlan", "layers", "precompile"}
    assert list(ops) == [n for n in minids_kernels.__all__ if n not in others]
    assert {"mla_attention", "mla_prefill", "fp8_mlp", "swiglu"} <= set(ops)
    assert all(kinds == (["torch", "triton"] if has_triton else ["torch"]) for kinds in ops.values())


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
