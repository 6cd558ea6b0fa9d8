"""The kernels' speed goals as data, and what a run's rows say about each.

A goal compares ours with the fastest of the peers it names that took part, at every case it matches, and takes the
geometric mean over these; or it asks for a share of a measured ceiling or for TFLOP/s, and takes the best case's. What
was not measured is neither met nor missed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.protocol import OURS, Case

Shape = Mapping[str, int]

RATIOS = {"ratio": "median_us", "first_s": "first_s"}  # what is compared with peers, and the rows' column it is in


@dataclass(frozen=True)
class Goal:
    """`of` "ratio": time of the fastest of `peers` over ours; "first_s": the same of the time to the first result, only
    from runs that began with empty compilers' caches; else a column of the rows. `bar` must be reached, `aim` is hoped
    for. `case`: the cases' name; `where` picks shapes."""

    number: int
    op: str
    case: str
    peers: tuple[str, ...]
    bar: float
    aim: float
    of: str = "ratio"
    where: Callable[[Shape], bool] = lambda shape: True
    which: str = ""  # `where` in words
    device: str = "cuda"

    def covers(self, op: str, case: str, shape: Shape, cold: bool) -> bool:
        """Whether a case counts for it in a run that did (`cold`) or did not begin with empty caches."""
        return (op, case) == (self.op, self.case) and self.where(shape) and (cold or self.of != "first_s")


def _large(shape: Shape) -> bool:
    return shape["M"] >= 4096


def _small(shape: Shape) -> bool:
    return 16 <= shape["M"] <= 128


def _heavy(shape: Shape) -> bool:
    return _small(shape) and shape["N"] * shape["K"] >= 50e6


def _experts(shape: Shape) -> float:
    return shape["M"] / shape["E"]


def _over_64_mb(shape: Shape) -> bool:
    return shape["M"] * shape["N"] * 2 >= 64e6


def _few_heads(shape: Shape) -> bool:
    return shape["B"] == 128 and shape["H"] * shape["S"] <= 64


def _v3(shape: Shape) -> bool:
    return (shape["Dqk"], shape["Dv"]) == (192, 128) and shape["documents"] == 1


LARGE, SMALL = "M >= 4096", "M 16..128"
TRITON = ("vllm triton", "sglang triton")

GOALS = (  # 21 and up are of MLA, 18 and 19 of the CPU
    Goal(1, "fp8_gemm", "fwd", ("cublas",), 1.0, 1.1, where=_large, which=LARGE),
    Goal(1, "fp8_gemm", "fwd", (), 1250, 1450, of="tflops", where=_large, which=LARGE),
    Goal(2, "fp8_gemm", "fwd", ("deepgemm",), 0.9, 1.0, where=_large, which=LARGE),
    Goal(3, "fp8_gemm", "fwd", ("torchao",), 2.5, 3.0, where=_large, which=LARGE),
    Goal(4, "fp8_gemm", "fwd", ("bf16",), 1.55, 1.8, where=_large, which=LARGE),
    Goal(5, "fp8_gemm", "fwd", ("cublas",), 2.0, 2.2, where=_small, which=SMALL),
    Goal(5, "fp8_gemm", "fwd", ("deepgemm",), 0.95, 1.05, where=_small, which=SMALL),
    Goal(5, "fp8_gemm", "fwd", (), 0.75, 0.85, of="of_copy", where=_heavy, which=f"{SMALL}, weights >= 50 MB"),
    Goal(6, "fp8_gemm", "wgrad", ("cublas",), 0.95, 1.1),
    Goal(6, "fp8_gemm", "wgrad", ("deepgemm",), 0.95, 1.1),
    Goal(6, "fp8_gemm", "wgrad", (), 900, 1100, of="tflops"),
    Goal(7, "grouped_fp8_gemm", "fwd", ("deepgemm",), 0.92, 1.0),
    Goal(7, "grouped_fp8_gemm", "fwd", (), 1150, 1350, of="tflops"),
    Goal(8, "grouped_fp8_gemm", "ragged fwd", ("deepgemm",), 1.1, 1.3),
    Goal(9, "grouped_fp8_gemm", "wgrad", ("deepgemm",), 1.0, 1.15),
    Goal(9, "grouped_fp8_gemm", "wgrad", (), 850, 1000, of="tflops"),
    Goal(10, "grouped_gemm", "fwd", ("F.grouped_mm",), 0.97, 1.05, where=lambda s: _experts(s) > 256,
         which="over 256 rows an expert"),
    Goal(10, "grouped_gemm", "fwd", ("F.grouped_mm",), 1.3, 2.0, where=lambda s: _experts(s) <= 256,
         which="at most 256 rows an expert"),
    Goal(10, "grouped_gemm", "fwd+bwd", ("F.grouped_mm",), 0.97, 1.05, where=lambda s: _experts(s) > 256,
         which="over 256 rows an expert"),
    Goal(10, "grouped_gemm", "fwd+bwd", ("F.grouped_mm",), 1.3, 2.0, where=lambda s: _experts(s) <= 256,
         which="at most 256 rows an expert"),
    Goal(11, "rms_norm", "fwd", ("compile", "liger", "quack"), 1.0, 1.05),
    Goal(11, "rms_norm", "fwd", (), 0.88, 0.93, of="of_copy", where=_over_64_mb, which="x >= 64 MB"),
    Goal(12, "rms_norm", "bwd", ("liger",), 2.0, 3.0, where=lambda s: s["N"] <= 8192, which="N <= 8192"),
    Goal(12, "rms_norm", "bwd", ("compile",), 1.0, 1.2),
    Goal(12, "rms_norm", "bwd", (), 0.8, 0.9, of="of_copy", where=_over_64_mb, which="x >= 64 MB"),
    Goal(13, "rms_norm_quant", "residual fwd", ("torchao",), 2.0, 2.4),
    Goal(13, "rms_norm_quant", "residual fwd", (), 0.8, 0.9, of="of_copy", where=_over_64_mb, which="x >= 64 MB"),
    Goal(14, "fp8_gemm", "linear fwd+bwd", ("bf16",), 1.25, 1.45),
    Goal(14, "fp8_gemm", "linear fwd+bwd", ("torchao",), 1.15, 1.4),
    Goal(15, "moe", "layer fwd+bwd", ("F.grouped_mm",), 1.3, 1.6),
    Goal(15, "moe", "layer fwd+bwd", ("dense",), 1 / 1.15, 1.0, where=lambda s: s["M"] >= 8192, which="M >= 8192"),
    Goal(16, "fp8_gemm", "fwd", ("deepgemm",), 3.0, 3.0, of="first_s"),
    Goal(18, "rms_norm", "fwd+bwd", ("eager",), 1.5, 1.5, where=lambda s: s == {"M": 4096, "N": 1024},
         which="M=4096 N=1024", device="cpu"),
    Goal(19, "cross_entropy", "fwd+bwd", ("eager",), 1.0, 1.0, where=lambda s: (s["M"], s["N"]) == (2048, 6400),
         which="M=2048 N=6400", device="cpu"),
    Goal(21, "mla_decode", "fwd", ("flashmla", "fa3"), 0.9, 1.0, where=_few_heads, which="B=128, H S <= 64"),
    Goal(22, "mla_decode", "fwd", ("flashmla",), 0.65, 0.85, where=lambda s: (s["B"], s["H"]) == (128, 128),
         which="B=128, H=128"),
    Goal(23, "mla_decode", "fwd", ("flashmla",), 0.85, 1.1, where=lambda s: s["B"] == 1 and s["T"] >= 32_768,
         which="B=1, T >= 32768"),
    Goal(24, "mla_decode", "fwd", TRITON, 1.2, 1.5, where=lambda s: s["H"] == 16, which="H=16"),
    Goal(24, "mla_decode", "fwd", TRITON, 2.0, 4.0, where=lambda s: s["H"] == 128, which="H=128"),
    Goal(25, "mla_decode", "fp8 fwd", ("without fp8",), 1.4, 1.7, where=lambda s: s["H"] <= 64, which="H <= 64"),
    Goal(27, "mla_attention", "fwd", ("cudnn",), 0.8, 0.95, where=_v3, which="192/128, one document"),
    Goal(30, "mla_attention", "fwd+bwd", ("flex",), 1.5, 2.0, where=lambda s: s["documents"] >= 16,
         which="16 documents or more"),
    Goal(31, "mla_prefill", "fwd", ("fa3",), 0.75, 0.95),
    Goal(32, "mla_attention", "fwd+bwd", ("efficient", "flex"), 2.0, 3.0, where=lambda s: s["Dqk"] == 48,
         which="48/32"),
)  # fmt: skip


def _value(goal: Goal, rows: Mapping[str, Mapping[str, Any]]) -> tuple[float, str] | None:
    """What one case (its timed rows by contestant) is worth to the goal, and the peer it was compared with."""
    ours = rows[OURS]
    if goal.of not in RATIOS:
        return None if ours[goal.of] is None else (ours[goal.of], "")
    peers = [rows[name] for name in goal.peers if name in rows]
    if not peers:
        return None
    column = RATIOS[goal.of]
    fastest = min(peers, key=lambda row: row[column])
    return fastest[column] / ours[column], fastest["contestant"]


def judge(
    rows: Iterable[Mapping[str, Any]], device: str, cold: bool = False, goals: Sequence[Goal] = GOALS
) -> list[dict[str, Any]]:
    """One dict a goal for this kind of device ("cuda" or "cpu"): value (None where unmeasured), the least of the cases'
    values, their number, bar, aim and whether it is met."""
    cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["status"] == "timed":
            cases[row["op"], row["label"]][row["contestant"]] = row
    found = []
    for goal in goals:
        if goal.device != device:
            continue
        values = []
        for (op, _), by_name in cases.items():
            ours = by_name.get(OURS)
            if ours is None or not goal.covers(op, ours["case"], ours["shape"], cold):
                continue
            worth = _value(goal, by_name)
            if worth is not None:
                values.append(worth)
        numbers = [number for number, _ in values]
        value = None
        if numbers:
            geometric = math.exp(sum(map(math.log, numbers)) / len(numbers))
            value = round(geometric if goal.of in RATIOS else max(numbers), 3)
        found.append({
            "goal": goal.number, "what": " ".join(filter(None, (goal.op, goal.case, goal.which))), "of": goal.of,
            "peer": "/".join(sorted({peer for _, peer in values} if numbers else set(goal.peers))),
            "value": value, "least": round(min(numbers), 3) if numbers else None, "cases": len(numbers),
            "bar": goal.bar, "aim": goal.aim, "met": None if value is None else value >= goal.bar,
        })  # fmt: skip
    return found


def in_order(
    cases: Iterable[tuple[str, Case]], device: str, cold: bool = False, goals: Sequence[Goal] = GOALS
) -> list[tuple[str, Case]]:
    """(op, case) pairs: the first case of each goal, then the second of each and so on, then what no goal covers. So a
    run that ends early has measured something of as many goals as may be."""
    seen: Counter[Goal] = Counter()
    ranks = []
    for op, case in cases:
        covering = [goal for goal in goals if goal.device == device and goal.covers(op, case.name, case.shape, cold)]
        ranks.append((min((seen[goal] for goal in covering), default=math.inf), (op, case)))
        seen.update(covering)
    return [pair for _, pair in sorted(ranks, key=lambda item: item[0])]


def table(judged: Sequence[Mapping[str, Any]]) -> str:
    """The goals as a Markdown table."""
    lines = [
        "| goal | what | peer | value | least | cases | bar | aim | met |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for g in judged:
        met = {None: "not measured", True: "yes", False: "no"}[g["met"]]
        what = g["what"] if g["of"] == "ratio" else f"{g['what']}: {g['of']}"
        values = " | ".join("" if g[key] is None else f"{g[key]:g}" for key in ("value", "least"))
        lines.append(
            f"| {g['goal']} | {what} | {g['peer']} | {values} | {g['cases']} | {g['bar']:g} | {g['aim']:g} | {met} |"
        )
    return "\n".join(lines) + "\n"
