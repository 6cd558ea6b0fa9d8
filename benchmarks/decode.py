"""Greedy decoding beside transformers' DeepseekV3ForCausalLM: the same weights, one process, turn by turn.

    python -m benchmarks.decode [--contexts 128 512 2048] [--batch 1] [--tokens 96] [--repeats 7] [--threads 2]
                                [--dtypes fp32 bf16]

On a CPU this is a model of 9M parameters, on a GPU the preset "small", where transformers also has a static cache, for
which it compiles its step. Time a token is taken from the first new token to the last, so the prompt's pass is not in
it; the first tokens behind it are slower (ours some five, while copied weights come into the caches), which short
generations show. Each side runs in each of its precisions (and transformers with each of its expert implementations for
single tokens); sides take turns, and the ratio compares the fastest median of one with the fastest median of the other.
Before that, both sides' greedy ids in the first of --dtypes must agree. The last line is one JSON object. Run it alone
on the machine: another process on the cores slows both sides several times over, and not alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from benchmarks import timing
from benchmarks.cases import MINI
from benchmarks.train import synchronize
from minids.config import ModelConfig, preset
from minids.convert.hf import to_hf_state
from minids.convert.hf_config import to_hf_config
from minids.infer.generate import LanguageModel
from minids.train.loop import pick_device

Generate = Callable[[Tensor, int, Callable[[], None]], Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPERTS = ("eager", "batched_mm")


class Ticks(StoppingCriteria):
    """Never stops transformers' generation; only says when a step's ids have come, for which it waits itself: on a GPU
    transformers asks before it does."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        synchronize(input_ids.device)
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def our_model(config: ModelConfig) -> LanguageModel:
    """Random weights with logits far enough apart that rounding does not change the likeliest token."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[-1] ** -0.5)
    return model


def minids_side(model: LanguageModel) -> Generate:
    def generate(ids: Tensor, tokens: int, tick: Callable[[], None]) -> Tensor:
        return model.generate(ids, tokens, stop_ids=(), streamer=lambda _: tick())

    return generate


def transformers_side(model: Any, cache: str | None = None) -> Generate:
    def generate(ids: Tensor, tokens: int, tick: Callable[[], None]) -> Tensor:
        settings: dict[str, Any] = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        if cache is not None:
            settings["cache_implementation"] = cache
        ticks = StoppingCriteriaList([Ticks(tick)])
        return model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=ticks, **settings)

    return generate


def sides(dtypes: Sequence[str], config: ModelConfig, device: torch.device) -> dict[str, dict[str, Generate]]:
    """Side -> variant -> how to generate."""
    model = our_model(config)
    ours, theirs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(to_hf_config(config)))
        state = {name: tensor.contiguous() for name, tensor in to_hf_state(model.state_dict(), config)}
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        for name in dtypes:
            mine = our_model(config).to(device)
            for parameter in mine.parameters():
                parameter.data = parameter.data.to(DTYPES[name])
            ours[name] = minids_side(mine)
            for experts in EXPERTS:
                peer = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=DTYPES[name], experts_implementation=experts)
                theirs[f"{name} {experts}"] = transformers_side(peer.eval().to(device))
                if device.type == "cuda":
                    theirs[f"{name} {experts} static"] = transformers_side(peer, "static")
    return {"minids": ours, "transformers": theirs}


def seconds_per_token(generate: Generate, ids: Tensor, tokens: int) -> float:
    ticks: list[float] = []
    generate(ids, tokens, lambda: ticks.append(time.perf_counter()))
    return (ticks[-1] - ticks[0]) / (len(ticks) - 1)


def measure(all_sides: dict[str, dict[str, Generate]], ids: Tensor, tokens: int, repeats: int) -> dict[str, Any]:
    """Medians in ms a token (of the whole batch) by side and variant, and the ratio of the fastest ones. Variants of
    transformers that break are left out, with the reason."""
    times: dict[str, dict[str, list[float]]] = {s: {v: [] for v in variants} for s, variants in all_sides.items()}
    failed: dict[str, str] = {}
    for turn in range(repeats + 1):
        for side, variants in all_sides.items():
            for variant, generate in variants.items():
                if variant in failed:
                    continue
                try:
                    seconds = seconds_per_token(generate, ids, tokens)
                except Exception as error:
                    if side == "minids":
                        raise
                    failed[variant] = timing.first_line(error)
                    del times[side][variant]
                    continue
                if turn:  # the first is the warm-up
                    times[side][variant].append(seconds)
    ms = {s: {v: round(statistics.median(t) * 1e3, 3) for v, t in variants.items()} for s, variants in times.items()}
    best = {side: min(variants.values()) for side, variants in ms.items()}
    return {
        "batch": len(ids),
        "context": ids.shape[1],
        "ms_per_token": ms,
        "ratio": round(best["transformers"] / best["minids"], 2),
        **({"failed": failed} if failed else {}),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048], help="prompt lengths in tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of each generation")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of all sides")
    parser.add_argument("--threads", type=int, help="default: torch's")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device("auto")
    config = MINI if device.type == "cpu" else preset("small", num_nextn_predict_layers=0)
    all_sides = sides(args.dtypes, config, device)
    prompt = torch.randint(2, config.vocab_size, (max(args.batch), max(args.contexts)), device=device)
    ids, peer_ids = (
        generate(prompt[:, :128], 64, lambda: None)
        for generate in (all_sides["minids"][args.dtypes[0]], all_sides["transformers"][f"{args.dtypes[0]} eager"])
    )
    if not torch.equal(ids, peer_ids):
        sys.exit(f"greedy ids of minids and transformers differ in {args.dtypes[0]}")
    cases = []
    for batch in args.batch:
        for context in args.contexts:
            cases.append(measure(all_sides, prompt[:batch, :context], args.tokens, args.repeats))
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "same_greedy_ids": True, "cases": cases}))


if __name__ == "__main__":
    main()
