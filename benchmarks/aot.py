"""Compiles every kernel for chips this machine need not have, and reads the machine code: no GPU, no driver.

    python -m benchmarks.aot [--rooms rms_norm ...] [--archs sm_90 ...] [--all] [--markdown benchmarks/results/aot.md]

What is compiled is what the launchers launch: each room's `launches(arch)` in benchmarks/ops calls the launchers on CPU
tensors, a recorder takes the place of launches, and Triton's own binder turns the recorded arguments into a
signature. By default one launch a kernel and architecture, with --all one for every entry of the launch tables.
Prints one JSON object a compiled kernel. Results are cached under MINIDS_CACHE (default: the user's cache folder) by
the source of kernels, Triton's version, arguments and options.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HIP = ("gfx942",)
ROOMS = tuple(sorted(path.stem for path in (Path(__file__).parent / "ops").glob("[a-z]*.py")))

SHARED_LIMIT = {  # bytes a thread block may have (CUDA C++ programming guide, table of compute capabilities)
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376,
    "gfx942": 65_536,
}  # fmt: skip

# of a multiprocessor (same guide): threads, bytes of shared memory (a block takes 1,024 more than it asks for), blocks
MULTIPROCESSOR = {
    "sm_80": (2048, 167_936, 32), "sm_86": (1536, 102_400, 16), "sm_89": (1536, 102_400, 24),
    "sm_90": (2048, 233_472, 32), "sm_100": (2048, 233_472, 32), "sm_120": (1536, 102_400, 24),
}  # fmt: skip
UNWRITTEN = (torch.empty, torch.empty_like, torch.Tensor.new_empty)  # what makes tensors for kernels to write
REGISTERS = 65_536  # of a multiprocessor; a warp takes them in units of 256

# counted in the machine code: tensor-core instructions, bulk tensor copies, asynchronous copies, spills, barriers, and
# global loads and stores by the bits a thread moves
INSTRUCTIONS = re.compile(
    r"\b(QGMMA|HGMMA|IGMMA|QMMA|HMMA|OMMA|UTCQMMA|UTCHMMA|UTMALDG|UTMASTG|LDL|STL|WARPGROUP\.DEPBAR|BAR\.SYNC"
    r"|v_mfma\w*)"
)
GLOBAL = re.compile(r"\b(LDGSTS|LDG|STG)\.E((?:\.\w+)*)")
BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}  # 32 without a suffix


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What became of one launch. `spills`: local-memory loads and stores; instructions: counts by kind."""

    room: str
    kernel: str
    arch: str
    label: str
    config: dict[str, Any]
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]
    triton: str

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.arch]

    @property
    def blocks(self) -> int:
        """Thread blocks that a multiprocessor holds at once."""
        threads, shared, blocks = MULTIPROCESSOR[self.arch]
        warps = self.config.get("num_warps", 4)
        registers = -(-self.registers * 32 // 256) * 256 * warps
        return min(threads // (32 * warps), shared // (self.shared + 1024), REGISTERS // registers, blocks)

    @property
    def in_flight(self) -> int:
        """Bytes that a multiprocessor's blocks may wait for at once: what the load instructions of the code move (one
        pass of its loops), or where bulk copies fill shared memory, that."""
        if self.instructions.get("UTMALDG"):
            return self.blocks * self.shared
        bits = sum(
            count * int(name.split(".")[1]) for name, count in self.instructions.items() if name.startswith("LDG")
        )
        return self.blocks * 32 * self.config.get("num_warps", 4) * bits // 8


@dataclasses.dataclass
class Launch:
    """A recorded launch."""

    label: str
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class RowNumbers(TorchFunctionMode):
    """Where no kernel runs, row numbers (int64) that one would have written are zeros: PyTorch may read rows by them.
    Other tensors stay unwritten, which costs no memory, unlike `minids_kernels.precompile`'s."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.zero_() if func in UNWRITTEN and out.dtype == torch.int64 else out


def record(calls: Sequence[tuple[str, Callable[[], Any]]], arch: str) -> list[Launch]:
    """Runs (label, call) pairs as if on `arch` and returns what they would have launched."""
    from minids_kernels import _launch

    launches: list[Launch] = []
    current = ""

    def take(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        launches.append(Launch(current, kernel, args, kwargs))

    former = {name: getattr(_launch, name) for name in ("arch", "multiprocessors", "BACKEND")}
    _launch.arch, _launch.multiprocessors, _launch.BACKEND = lambda x: arch, lambda x: 132, "triton"
    try:
        with _launch.launched_by(take), RowNumbers():
            for label, call in calls:
                current = label
                call()
    finally:
        for name, value in former.items():
            setattr(_launch, name, value)
    return launches


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", arch, 64) if arch in HIP else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _source(launch: Launch, target: Any) -> tuple[Any, Any]:
    """Triton's ASTSource and options of a launch, by the steps of JITFunction.run before it asks for a device."""
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    fn = launch.kernel
    backend = make_backend(target)
    kwargs = {**launch.kwargs, "debug": False, "instrumentation_mode": ""}
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = binder(*launch.args, **kwargs)
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
    return (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constexprs, attrs), options


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _machine_code(cubin: bytes) -> tuple[str, int]:
    """SASS text and registers a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        sass, usage = (
            subprocess.run([_tool("cuobjdump"), flag, file], check=True, capture_output=True, text=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    return sass, int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]


def _compile(launch: Launch, room: str, arch: str) -> Compiled:
    import triton

    target = _target(arch)
    source, options = _source(launch, target)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    if arch in HIP:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
    else:
        text, registers = _machine_code(compiled.asm["cubin"])
    counts = Counter(match.group(1) for match in INSTRUCTIONS.finditer(text))
    for kind, suffixes in GLOBAL.findall(text):
        bits = next((BITS[suffix] for suffix in suffixes.split(".") if suffix in BITS), 32)
        counts[f"{kind}.{bits}"] += 1
    if arch not in HIP:
        spills = counts.pop("LDL", 0) + counts.pop("STL", 0)
    names = launch.kernel.arg_names
    config = {
        name: value for name, value in launch.kwargs.items() if name not in names or isinstance(value, int | bool)
    }
    if "num_warps" in config:
        config["num_warps"] = compiled.metadata.num_warps  # with those that warp specialisation adds
    return Compiled(
        room, launch.kernel.__name__, arch, launch.label, config, registers, spills, compiled.metadata.shared,
        dict(sorted(counts.items())), triton.__version__,
    )  # fmt: skip


def _cache_file(launch: Launch, arch: str) -> Path:
    import triton

    base = os.environ.get("MINIDS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minids"
    source, options = _source(launch, _target(arch))
    key = json.dumps(
        [
            triton.__version__,
            arch,
            launch.label,
            source.hash(),
            options.hash(),
            Path(__file__).read_text(encoding="utf-8"),
        ]
    )
    return Path(base) / "aot" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def compile_launch(launch: Launch, room: str, arch: str) -> Compiled:
    """`launch` compiled for `arch`, from the cache if it was before."""
    file = _cache_file(launch, arch)
    if file.is_file():
        return Compiled(**json.loads(file.read_text(encoding="utf-8")))
    result = _compile(launch, room, arch)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as temporary:
        json.dump(dataclasses.asdict(result), temporary)
    Path(temporary.name).replace(file)
    return result


def room_launches(room: str, arch: str, every: bool) -> list[Launch]:
    """What `room` launches on `arch`: with `every` at each shape of its launch tables, else each kernel once."""
    module = importlib.import_module(f"benchmarks.ops.{room}")
    launches = record(module.launches(arch, every), arch)
    if every:
        return launches
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(launch.kernel.__name__, launch)
    return list(first.values())


def compile_room(room: str, arch: str, every: bool = False) -> list[Compiled]:
    """All compiled launches of a room; the same machine code is listed once."""
    return [compile_launch(launch, room, arch) for launch in room_launches(room, arch, every)]


def _job(job: tuple[str, str, bool]) -> list[Compiled]:
    return compile_room(*job)


def markdown(results: Sequence[Compiled]) -> str:
    """A table of what was compiled."""
    versions = ", ".join(sorted({r.triton for r in results}))
    lines = [
        "# Kernels compiled ahead of time", "",
        f"Written by `python -m benchmarks.aot --markdown benchmarks/results/aot.md` (Triton {versions}), with "
        "--all for every table entry. "
        "Registers are a thread's, shared memory is a block's in bytes, spills are local-memory instructions. "
        "Blocks are those that a multiprocessor holds at once, in flight the bytes that they may wait for at once: "
        "loads of one pass of the code's loops, or the shared memory that bulk copies fill. Global loads and stores "
        "(LDG, STG, LDGSTS) are counted by the bits a thread moves.", "",
        "| kernel | arch | case | config | registers | spills | shared | blocks | in flight | instructions |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for r in results:
        config = " ".join(f"{name}={value}" for name, value in r.config.items())
        counts = " ".join(f"{name} {count}" for name, count in r.instructions.items())
        waits = f"{r.blocks} | {r.in_flight}" if r.arch in MULTIPROCESSOR else " | "
        numbers = f"{r.registers} | {r.spills} | {r.shared} | {waits}"
        lines.append(f"| {r.kernel} | {r.arch} | {r.label} | {config} | {numbers} | {counts} |")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS)
    parser.add_argument("--archs", nargs="+", default=ARCHS, choices=ARCHS + HIP)
    parser.add_argument("--all", action="store_true", help="every entry of the launch tables")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: interpreted kernels cannot be compiled; unset it")
    jobs = [(room, arch, options.all) for room in options.rooms for arch in options.archs]
    results = []
    with workers(options.workers) as pool:
        for found in pool.map(_job, jobs):
            for result in found:
                print(json.dumps(dataclasses.asdict(result)), flush=True)
                results.append(result)
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
