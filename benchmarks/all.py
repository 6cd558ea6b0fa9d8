"""Everything that is measured on a GPU, in one command that ends in time and goes on where it stopped.

    python -m benchmarks.all --out DIR [--minutes 9.5] [--only PART ...] [--minimind CHECKOUT] [--commit NAME]

Runs its parts one after the other, each a process of its own: first whether the kernels are right, then whole models,
then kernels beside their peers, which take what time is left and deal it out to all goals. DIR gets one `all.json`
(per part its command, exit code, seconds and last line of output), `<part>.out` and `<part>.log` (stdout and stderr),
and what the parts themselves write. Repeated with the same DIR it runs the parts that have not come to an end yet, with
--only those that are named, again or not. A part takes no longer than its own share of minutes, and none outlasts
--minutes. The last line of stdout is one JSON object; the exit code is 1 where a part failed, 2 where DIR holds another
state's results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import ROOT, commit
from benchmarks.watch import say
from minids.errors import InputError
from minids.files import read_json, write_json

SWITCHES = {"UNSLOTH_MOE_DISABLE_AUTOTUNE": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}  # tuning would take it all
LEAST = 15  # seconds: a part that has less left is not begun
GRACE = 10  # seconds between asking a part to end and ending it


@dataclass(frozen=True)
class Part:
    """`python -m command` for at most `minutes`; {out}, {minimind}, {minutes} and {commit} are filled in."""

    name: str
    minutes: float
    command: str


SANITIZER = "tests/kernels/test_sanitizer.py"
PARTS = (
    Part("tests", 4, f"pytest -q -n 8 -m gpu --ignore {SANITIZER}"),
    Part(
        "train", 4,
        "benchmarks.train --rounds 9 --dtypes bf16 fp8 {minimind} --out {out}/train.json "
        "--profile {out}/train_kernels.json",
    ),
    Part("first_step", 2, "benchmarks.first_step"),
    Part("decode", 3, "benchmarks.decode --contexts 128 2048 --tokens 48 --repeats 3"),
    Part(
        "kernels", 60,
        "benchmarks.run --repeats 20 --minutes {minutes} --out {out}/kernels.json --resume --commit {commit}",
    ),
    Part(
        "train_compiled", 6,
        "benchmarks.train --rounds 5 --compile --sides 'transformers grouped_mm compiled' "
        "--out {out}/train_compiled.json",
    ),
    Part("train_fp8", 2, "benchmarks.train --rounds 3 --dtypes fp8 --sides --profile {out}/train_fp8_kernels.json"),
    Part("sanitizer", 6, f"pytest -q -m gpu {SANITIZER}"),
    Part("all_tests", 9, "pytest -q -n 8"),
)  # fmt: skip


def command(part: Part, options: argparse.Namespace, seconds: float) -> list[str]:
    minimind = f"--minimind {shlex.quote(str(options.minimind))}" if options.minimind else ""
    filled = part.command.format(
        out=shlex.quote(str(options.out)), minimind=minimind, minutes=round((seconds - LEAST) / 60, 1),
        commit=shlex.quote(options.commit),
    )  # fmt: skip
    return [sys.executable, "-m", *shlex.split(filled)]


def end(process: subprocess.Popen) -> None:
    """It and all that it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def last_line(file: Path) -> Any:
    """Of a part's output, read if it is JSON."""
    lines = file.read_text(errors="replace").strip().splitlines() or [""]
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError:
        return lines[-1]


def run_part(part: Part, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Its exit code is None where it was cut off."""
    arguments = command(part, options, seconds)
    out, log = (options.out / f"{part.name}.{kind}" for kind in ("out", "log"))
    start = time.monotonic()
    with out.open("wb") as stdout, log.open("wb") as stderr:
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=stdout, stderr=stderr, env=SWITCHES | os.environ, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    return {
        "command": shlex.join(["python", *arguments[1:]]), "exit_code": code,
        "seconds": round(time.monotonic() - start, 1), "result": last_line(out),
    }  # fmt: skip


def ended(name: str, done: dict[str, Any]) -> bool:
    """Whether there is no more of it to run."""
    result = done.get("result")
    return done.get("exit_code") is not None and not (isinstance(result, dict) and result.get("left_out"))


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """-> what all.json holds. Raises InputError where it is of another commit."""
    file = options.out / "all.json"
    found: dict[str, Any] = {"commit": options.commit, "parts": {}}
    if file.exists():
        found = read_json(file)
        if found["commit"] != options.commit:
            raise InputError(f"{file}: commit was {found['commit']}, now it is {options.commit}")
    options.out.mkdir(parents=True, exist_ok=True)
    stop = time.monotonic() + 60 * options.minutes
    for part in PARTS:
        if part.name not in options.only if options.only else ended(part.name, found["parts"].get(part.name, {})):
            continue
        seconds = min(60 * part.minutes, stop - time.monotonic() - GRACE)
        if seconds < LEAST:
            break
        say(f"{part.name}: at most {seconds:.0f} s")
        done = found["parts"][part.name] = run_part(part, options, seconds)
        write_json(file, found)
        code = "cut off" if done["exit_code"] is None else f"exit code {done['exit_code']}"
        say(f"{part.name}: {code} after {done['seconds']} s: {str(done['result'])[-300:]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the results")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (default: 9.5)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="default: all, in this order")
    parser.add_argument("--minimind", type=Path, metavar="CHECKOUT", help="of MiniMind, which competes in `train` then")
    parser.add_argument("--commit", default=commit(), help="the name of this state, where git is not there to tell")
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    try:
        parts = run_all(options)["parts"]
    except InputError as error:
        say(str(error))
        return 2
    codes = {name: done["exit_code"] for name, done in parts.items()}
    left = [part.name for part in PARTS if not ended(part.name, parts.get(part.name, {}))]
    print(json.dumps({"dir": str(options.out), "exit_codes": codes, "left": left}))
    return 1 if any(code for code in codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
