"""Training speed on this machine: minids against transformers' DeepseekV3ForCausalLM, one process, steps interleaved.

    python -m benchmarks.train [--rounds 9] [--dtypes fp32 bf16] [--compile]

A step is forward, backward, gradient clipping and AdamW on 8 sequences of 256 tokens. All sides start from the same
weights and see the same batches; their first losses must agree before anything is timed. Warm-up runs each side in
every precision; only its fastest goes on to the timed rounds, so that nobody's caches are cleared by what does not
count. Prints one JSON object with tokens/s (medians; of the warm-up the fastest step) and the ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from benchmarks.cases import MINI
from benchmarks.peers import transformers_model
from minids.model import DeepseekV3

BATCH, LENGTH, LR = 8, 256, 1e-3
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of a loss near ln(6400) = 8.8


class Side:
    """One contestant: a model, its optimizer and its loss, in one precision."""

    def __init__(
        self, name: str, model: torch.nn.Module, loss: Callable[[Any, torch.Tensor], torch.Tensor], dtype: str
    ):
        self.peer, self.name, self.dtype, self.loss = name, f"{name} {dtype}", dtype, loss
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, batch: torch.Tensor) -> None:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            loss = self.loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def tokens_per_second(self, warmup: int) -> float:
        return BATCH * LENGTH / statistics.median(self.seconds[warmup:])

    def fastest(self) -> float:
        """Tokens/s of the fastest step so far."""
        return BATCH * LENGTH / min(self.seconds)


def our_loss(model: DeepseekV3, batch: torch.Tensor) -> torch.Tensor:
    """Without the balance loss (transformers has none); it is computed all the same."""
    losses = model.losses(batch, batch)
    return losses.nll_sum / losses.tokens + 0.0 * losses.balance


def their_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def contestants(compiled: bool, dtypes: Sequence[str]) -> list[Side]:
    torch.manual_seed(0)
    model = DeepseekV3(MINI)
    sides = [Side("minids", copy.deepcopy(model), our_loss, dtype) for dtype in dtypes]
    for experts in ("eager", "grouped_mm"):
        for dtype in dtypes:
            sides.append(Side(f"transformers {experts}", transformers_model(model, experts), their_loss, dtype))
            if compiled:
                peer = torch.compile(transformers_model(model, experts))
                sides.append(Side(f"transformers {experts} compiled", peer, their_loss, dtype))
    return sides


def run(sides: Sequence[Side], batches: torch.Tensor, label: str) -> None:
    """A step of each side on each batch in turn."""
    for index, batch in enumerate(batches):
        for side in sides:
            side.step(batch)
        print(f"{label} {index + 1} of {len(batches)}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, in every precision, at least 1")
    parser.add_argument("--compile", action="store_true", help="also transformers under torch.compile")
    parser.add_argument(
        "--dtypes", nargs="+", choices=LOSS_TOLERANCE, default=list(LOSS_TOLERANCE), help="of all sides"
    )
    options = parser.parse_args()
    if options.warmup < 1:
        parser.error(f"--warmup: got {options.warmup}, allowed is 1 or more")
    sides = contestants(options.compile, options.dtypes)
    batches = torch.randint(0, MINI.vocab_size, (options.warmup + options.rounds, BATCH, LENGTH))
    run(sides, batches[: options.warmup], "warm-up")
    for side in sides:
        if not abs(side.losses[0] - sides[0].losses[0]) < LOSS_TOLERANCE[side.dtype]:
            raise SystemExit(f"{side.name}: first loss {side.losses[0]}, {sides[0].name} has {sides[0].losses[0]}")
    warm = {side.name: round(side.fastest()) for side in sides}
    sides = [max((s for s in sides if s.peer == peer), key=Side.fastest) for peer in {s.peer: None for s in sides}]
    run(sides, batches[options.warmup :], "round")
    speed = {side.name: side.tokens_per_second(options.warmup) for side in sides}
    ours = max(value for name, value in speed.items() if name.startswith("minids"))
    theirs = max(value for name, value in speed.items() if name.startswith("transformers") and "compiled" not in name)
    parameters = sum(p.numel() for p in sides[0].model.parameters())
    report: dict[str, Any] = {
        "what": f"training step, {BATCH} x {LENGTH} tokens, {parameters} parameters",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "warm_up_tokens_per_second": warm,
        "tokens_per_second": {name: round(value) for name, value in speed.items()},
        "ratio": round(ours / theirs, 3),
    }
    if options.compile:
        report["ratio_to_compiled"] = round(ours / max(v for n, v in speed.items() if "compiled" in n), 3)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
