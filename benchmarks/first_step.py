"""Seconds from a fresh process's first import to the end of its first training step.

    python -m benchmarks.first_step [the options of benchmarks.train that set the model and the batch]

Two processes one after the other: the first with empty caches of the compilers, the second with what that one left
there. Prints one JSON object: for each its seconds in all, and how they were spent ("import": all but torch); on stderr
when each has ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
CHILD = "from benchmarks.first_step import first_step; first_step()"


def first_step() -> None:
    """In this process, which must have imported nothing yet; prints the seconds."""
    marks = [time.perf_counter()]
    import torch

    marks.append(time.perf_counter())
    from benchmarks import train
    from minids.train.loop import pick_device

    marks.append(time.perf_counter())
    device = pick_device("auto")
    options = train.parse(None, device)
    (side,) = train.contestants(options.config, device, [train.OURS], options.dtypes[-1:])
    batch = torch.randint(0, options.config.vocab_size, (options.batch, options.length))
    train.synchronize(device)
    marks.append(time.perf_counter())
    side.step(batch)
    marks.append(time.perf_counter())
    names = ("import torch", "import", "model", "step")
    spent = {name: round(b - a, 2) for name, a, b in zip(names, marks, marks[1:], strict=False)}
    print(json.dumps({"seconds": round(marks[-1] - marks[0], 2), **spent}))


def main(arguments: Sequence[str] | None = None) -> None:
    command = [sys.executable, "-c", CHILD, *(sys.argv[1:] if arguments is None else arguments)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | dict.fromkeys(CACHES, empty)
        for name in ("cold", "warm"):
            child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(child.stdout)
            print(f"{name}: {child.stdout}", end="", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
