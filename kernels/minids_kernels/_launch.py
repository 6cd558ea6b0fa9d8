"""How rooms launch Triton kernels: which backend serves a tensor, what chip it is on, which table entry fits its shape.

Nothing is tuned at run time. `configs/<room>.json` holds, by kernel and architecture, entries that
`python -m benchmarks.tune` measured or that the room's author chose; the entry whose shape is nearest is taken:

    {"rms_norm_fwd": {"sm_90": [{"shape": {"N": 7168}, "config": {"ROWS": 1, "num_warps": 8}}, ...], ...}, ...}

`config` holds constexpr arguments of the kernel and Triton's own options (num_warps, num_stages, maxnreg).
An architecture without entries of its own uses those of the nearest older one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for Windows and macOS: kernels are defined there, and PyTorch serves all tensors
    from types import SimpleNamespace

    triton = SimpleNamespace(
        jit=lambda fn=None, **options: fn or (lambda fn: fn),
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    tl = None
    HAS_TRITON = False
else:
    HAS_TRITON = True

__all__ = [
    "HAS_TRITON",
    "arch",
    "config",
    "launch",
    "launched_by",
    "multiprocessors",
    "queued",
    "runs_gluon",
    "tl",
    "triton",
    "use_triton",
]

BACKENDS = ("", "triton", "torch")
BACKEND = os.environ.get("MINIDS_KERNELS", "")  # forces one for all tensors; "" chooses by the tensor's device
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_GLUON = not INTERPRETED  # Triton's interpreter knows no Gluon; that of the tests does, and says so here

if BACKEND not in BACKENDS:
    raise ValueError(f"MINIDS_KERNELS: got {BACKEND!r}, allowed are 'triton', 'torch' or nothing")


def use_triton(x: Tensor) -> bool:
    """Whether Triton kernels serve x: CUDA and HIP tensors, and CPU tensors under TRITON_INTERPRET=1, unless
    MINIDS_KERNELS says otherwise. fp64 is always PyTorch's."""
    if not HAS_TRITON or BACKEND == "torch" or x.dtype == torch.float64:
        return False
    return BACKEND == "triton" or x.is_cuda or (INTERPRETED and x.device.type == "cpu")


@functools.cache
def _device_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch(x: Tensor) -> str:
    """ "sm_90", "gfx942", ... of the chip that x lies on; the interpreter counts as "sm_90"."""
    return _device_arch(x.get_device()) if x.is_cuda else "sm_90"


def runs_gluon(x: Tensor) -> bool:
    """Whether kernels in Gluon can run where x lies: all of them have Hopper's instructions, which no later chip has,
    while launch tables of a later chip may be Hopper's."""
    return RUNS_GLUON and arch(x) == "sm_90"


@functools.cache
def _device_multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(x: Tensor) -> int:
    """Streaming multiprocessors of x's device; 4 in the interpreter, where a program costs the same however few run."""
    return _device_multiprocessors(x.get_device()) if x.is_cuda else 4


@functools.cache
def _table(room: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    text = resources.files(__package__).joinpath("configs", f"{room}.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(text)
    return table


def _generation(arch: str) -> tuple[str, int]:
    vendor, number = re.fullmatch(r"([a-z_]+)([0-9a-f]+)", arch).groups()  # type: ignore[union-attr]
    return vendor, int(number, 16)


def entries(room: str, kernel: str, arch: str) -> Sequence[Mapping[str, Any]]:
    """The table's entries for `kernel` on `arch`: its own, else the nearest older architecture's, else the oldest's."""
    by_arch = _table(room)[kernel]
    if arch in by_arch:
        return by_arch[arch]
    vendor, number = _generation(arch)
    known = sorted((_generation(name)[1], name) for name in by_arch if _generation(name)[0] == vendor)
    older = [name for generation, name in known if generation <= number]
    name = older[-1] if older else known[0][1] if known else min(by_arch, key=_generation)
    return by_arch[name]


@functools.lru_cache(maxsize=4096)
def _nearest(room: str, kernel: str, arch: str, shape: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    wanted = dict(shape)

    def distance(entry: Mapping[str, Any]) -> float:
        return sum(abs(math.log2((wanted[name] + 1) / (size + 1))) for name, size in entry["shape"].items())

    return dict(min(entries(room, kernel, arch), key=distance)["config"])


def config(room: str, kernel: str, arch: str, **shape: int) -> dict[str, Any]:
    """The nearest entry's config (do not change it): the least sum over its dimensions of |log2 of the ratio|."""
    return _nearest(room, kernel, arch, tuple(shape.items()))


def queued(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on `device`. From the CPU to a GPU the copy takes its turn behind what is queued, and nobody waits for it."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.to(dtype).pin_memory().to(device, non_blocking=True)
    return x.to(device, dtype)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """kernel[grid](*args, **kwargs) on the device of its first tensor; nothing at all for an empty grid."""
    first = next(x for x in args if isinstance(x, Tensor))
    with torch.cuda.device_of(first) if first.is_cuda else contextlib.nullcontext():
        _launched_by(kernel, grid, *args, **kwargs)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    if 0 not in grid:
        kernel[grid](*args, **kwargs)


_launched_by: Callable[..., None] = run


@contextlib.contextmanager
def launched_by(call: Callable[..., None]) -> Iterator[None]:
    """Has `call(kernel, grid, *args, **kwargs)` in the place of `run` for every launch, those of empty grids too."""
    global _launched_by
    former, _launched_by = _launched_by, call
    try:
        yield
    finally:
        _launched_by = former
