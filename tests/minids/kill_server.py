"""Runs a stage over and over in forked processes and kills them: `python kill_server.py STAGE FOLDER KILLS SEED`.

Forking after the imports makes a start cost milliseconds. Every process resumes the run and is killed with SIGKILL: in
turn at a random instant, and while a random one of its checkpoints is being written or deleted. When one ends by itself
first, its finished run folder (killed-0, killed-1, ...) is kept and the next one begun. Prints one JSON object: kills,
how many of them left a checkpoint half-written, and the finished run folders.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import torch

from minids.train import loop
from minids.train.dpo import dpo
from minids.train.pretrain import pretrain
from minids.train.sft import sft
from tests.minids import tiny

STAGES = {
    "pretrain": (pretrain, lambda folder, out: tiny.pretrain_config(folder, out, steps=12, every=1)),
    "sft": (sft, lambda folder, out: tiny.sft_config(folder, out, "base", steps=12, every=1)),
    "dpo": (dpo, lambda folder, out: tiny.dpo_config(folder, out, "base", steps=12, every=1)),
}


def main(stage: str, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # as every forked process; a thread pool would not survive the fork
    loop.write_curves = lambda *_: False  # drawing takes longer than training does here
    function, configure = STAGES[stage]
    generator = random.Random(seed)

    began = time.monotonic()
    process = start(function, configure(folder, "whole"))
    os.waitpid(process, 0)
    longest = time.monotonic() - began

    done, half_written, runs, starts = 0, 0, ["whole"], 0
    while done < kills or starts:
        name = f"killed-{len(runs) - 1}"
        process = start(function, configure(folder, name))
        starts += 1
        if done < kills:
            if starts % 2:
                time.sleep(generator.uniform(0, longest / 3))
            else:
                wait_for_save(folder / name, generator.uniform(0, longest / 3), longest)
                time.sleep(generator.choice((0, 0.002, 0.01)))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            done += 1
            half_written += has_temporary(folder / name)
        elif os.WEXITSTATUS(status) == 0:
            runs.append(name)
            starts = 0
        else:
            sys.exit(f"{name}: exit status {os.WEXITSTATUS(status)} after {done} kills")
    print(json.dumps({"kills": done, "half_written": half_written, "runs": runs[1:]}))


def has_temporary(out: Path) -> bool:
    """Whether a checkpoint is half-written or half-deleted."""
    return out.is_dir() and any(re.fullmatch(r"\.step_.*\.(tmp|old)", name) for name in os.listdir(out))


def wait_for_save(out: Path, after: float, longest: float) -> None:
    """Until the first save later than `after` seconds from now, at most `longest`."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < longest and (passed < after or not has_temporary(out)):
        time.sleep(0.0002)


def start(function, config) -> int:
    """The stage in a process of its own; its id."""
    process = os.fork()
    if process:
        return process
    try:
        function(config, resume=True)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
