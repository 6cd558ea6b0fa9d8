"""`minids doctor`: what this machine has, which kernels will run how, what is missing and how to get it.

Nothing here fails for a thing that is missing: what cannot be found out is None, and a line of advice says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from minids import corpus
from minids.train.log import note

Facts = dict[str, Any]

# Oldest version allowed (pyproject.toml) and the one the tests ran against (constraints.txt).
VERSIONS = {"torch": ("2.11", "2.13.0"), "triton": ("3.6", "3.7.1"), "numpy": ("1.26", "2.4.6")}
OLDEST_PYTHON = (3, 11)
EXTRAS = {
    "quickstart": ("pip", "matplotlib"),
    "plot": ("matplotlib",),
    "track": ("tensorboard",),
    "test": ("pytest", "hypothesis", "transformers"),
}
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_tile", "sve", "bf16")
DISK_WANTED = 2 << 30  # bytes: a quickstart and its checkpoints take a tenth
MEMORY_WANTED = 4 << 30


def _module(name: str) -> Any:
    """The module, or None when it cannot be imported, whatever the reason (a broken install raises anything)."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def _numbers(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; 0 for a part that is no number."""
    parts = [int(part) if part.isdigit() else 0 for part in [*version.split("."), "0"][:2]]
    return parts[0], parts[1]


def versions() -> dict[str, Facts]:
    """name -> {version (None: not installed), tested, oldest, state}; state: tested, newer, older, too old, missing."""
    found = {}
    for name, (oldest, tested) in VERSIONS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = {"version": None, "oldest": oldest, "tested": tested, "state": "missing"}
            continue
        ours, goal = _numbers(version), _numbers(tested)
        state = "tested" if ours == goal else "newer" if ours > goal else "older"
        state = "too old" if ours < _numbers(oldest) else state
        found[name] = {"version": version, "oldest": oldest, "tested": tested, "state": state}
    return found


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def _free_disk(path: Path) -> int | None:
    """Free bytes on the disk that `path` lies on, or will."""
    try:
        return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free
    except (OSError, StopIteration):
        return None


def machine(torch: Any) -> Facts:
    """CPU, memory, disk and GPUs. `torch` None: what can be said without it."""
    facts: Facts = {
        "system": platform.platform(terse=True),
        "cpu": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "cpu_features": None,
        "memory_bytes": _memory(),
        "free_disk_bytes": _free_disk(Path.cwd()),
        "gpus": [],
    }
    if torch:
        features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        facts["cpu_features"] = [name for name in CPU_FEATURES if features.get(name)]
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            gpu = torch.cuda.get_device_properties(index)
            capability = f"{gpu.major}.{gpu.minor}"
            facts["gpus"].append({"name": gpu.name, "capability": capability, "memory_bytes": gpu.total_memory})
    return facts


def recommended_dtype(torch: Any) -> dict[str, str]:
    """Device -> dtype of matrix products that training picks there."""
    if not torch:
        return {}
    from minids.precision import pick_dtype

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {name: str(pick_dtype("auto", torch.device(name))).removeprefix("torch.") for name in devices}


def kernels() -> dict[str, list[str]] | None:
    """Op -> its implementations: "torch", and "triton" where Triton is installed, which every op runs or is made of ops
    that do. None when the package cannot be imported."""
    package = _module("minids_kernels")
    if package is None:
        return None
    kinds = ["torch", "triton"] if package._launch.HAS_TRITON else ["torch"]
    ops = (name for name in package.__all__ if inspect.isfunction(getattr(package, name)))
    return {name: kinds for name in ops if not name.endswith("_reference") and name != "precompile"}


def advice(facts: Facts) -> list[str]:
    """What is missing or unusual, a line each, with what to type."""
    lines = []
    if sys.version_info < OLDEST_PYTHON:
        lines.append(f"Python {facts['python']} is too old: minids needs {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    for name, version in facts["versions"].items():
        wanted = f"pip install {name}=={version['tested']}"
        if version["state"] in ("missing", "too old") and (name != "triton" or platform.system() == "Linux"):
            lines.append(f"{name} is {version['state']}: {wanted}")
        elif version["state"] in ("newer", "older"):
            lines.append(
                f"{name} {version['version']} is {version['state']} than the tested one; if it fails: {wanted}"
            )
    ops, gpus = facts["kernels"], facts["machine"]["gpus"]
    if ops is None:
        lines.append("minids_kernels cannot be imported: pip install -c constraints.txt -e . in the checkout")
    elif not any("triton" in kinds for kinds in ops.values()):
        lines.append("no Triton here: on CPU and CUDA alike every op runs as PyTorch")
    if not gpus:
        lines.append("no CUDA GPU: training runs on the CPU, which is enough for quickstart")
    memory, disk = facts["machine"]["memory_bytes"], facts["machine"]["free_disk_bytes"]
    if memory is not None and memory < MEMORY_WANTED:
        lines.append(f"{_size(memory)} of memory: give quickstart a smaller --minutes")
    if disk is not None and disk < DISK_WANTED:
        lines.append(f"only {_size(disk)} free on this disk: give --out on another")
    missing = facts["quickstart"]["missing"]
    if missing:
        names = ", ".join(missing)
        lines.append(f"quickstart will download {names} (14 MB in all) into {facts['quickstart']['cache']}")
    for extra, parts in facts["extras"].items():
        absent = [name for name, there in parts.items() if not there]
        if absent:
            lines.append(f"{', '.join(absent)} not installed: pip install -c constraints.txt -e '.[{extra}]'")
    return lines


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / (1 << 30):.1f} GiB"


def _lines(facts: Facts) -> list[tuple[str, str]]:
    """The table: what, finding."""
    machine = facts["machine"]
    rows = [("minids", facts["minids"]), ("python", facts["python"])]
    for name, version in facts["versions"].items():
        rows.append((name, f"{version['version'] or 'not installed'} ({version['state']}; tested {version['tested']})"))
    features = ", ".join(machine["cpu_features"] or []) or "none known"
    rows += [
        ("system", machine["system"]),
        ("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {features}"),
        ("memory", _size(machine["memory_bytes"])),
        ("free disk", _size(machine["free_disk_bytes"])),
    ]
    for gpu in machine["gpus"]:
        rows.append(("gpu", f"{gpu['name']}, compute capability {gpu['capability']}, {_size(gpu['memory_bytes'])}"))
    rows.append(("dtype", ", ".join(f"{device}: {dtype}" for device, dtype in facts["dtype"].items()) or "unknown"))
    for op, kinds in (facts["kernels"] or {}).items():
        on_gpu = "triton" if "triton" in kinds else "torch"
        rows.append((f"op {op}", f"cpu: torch, cuda: {on_gpu}"))
    quickstart = facts["quickstart"]
    rows.append(("cache", quickstart["cache"]))
    rows.append(
        ("quickstart text", f"missing: {', '.join(quickstart['missing'])}" if quickstart["missing"] else "cached")
    )
    for extra, parts in facts["extras"].items():
        state = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in parts.items())
        rows.append((f"extra {extra}", state))
    return rows


def doctor() -> Facts:
    """The facts, also printed to stderr as a table with advice below it."""
    torch = _module("torch")
    facts: Facts = {
        "minids": importlib.import_module("minids").__version__,
        "python": platform.python_version(),
        "versions": versions(),
        "machine": machine(torch),
        "dtype": recommended_dtype(torch),
        "kernels": kernels(),
        "quickstart": {
            "cache": str(corpus.cache_dir()),
            "missing": [f"{package.name}=={package.version}" for package in corpus.missing()],
        },
        "extras": {extra: {name: _installed(name) for name in names} for extra, names in EXTRAS.items()},
    }
    facts["advice"] = advice(facts)
    rows = _lines(facts)
    width = max(len(name) for name, _ in rows)
    note("\n".join(f"{name:<{width}}  {finding}" for name, finding in rows))
    note("\n".join(["", *(f"- {line}" for line in facts["advice"])]))
    return facts


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
