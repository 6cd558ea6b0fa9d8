"""Goals against made-up rows."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.goals import GOALS, Goal, in_order, judge, table
from benchmarks.protocol import OURS, Case, Inputs


def row(contestant: str, us: float, m: int, **more: Any) -> dict[str, Any]:
    return {
        "op": "gemm", "label": f"fwd M={m}", "case": "fwd", "shape": {"M": m}, "contestant": contestant,
        "status": "timed", "median_us": us, "of_copy": None, **more,
    }  # fmt: skip


ROWS = [
    row(OURS, 10, 1), row("a", 40, 1), row("b", 20, 1),  # the fastest peer is 2 times ours
    row(OURS, 10, 2), row("a", 80, 2), row("b", 5, 2, status="wrong"),  # 8 times: b does not count
    row(OURS, 10, 3, of_copy=0.5), row("a", 10, 3),  # 1 time
]  # fmt: skip


def only(goal: Goal) -> dict[str, Any]:
    (found,) = judge(ROWS, "cuda", goals=[goal])
    return found


def test_ratio_is_the_geometric_mean_over_cases_of_the_fastest_peer_that_was_right() -> None:
    found = only(Goal(1, "gemm", "fwd", ("a", "b"), 3.9, 5.0, where=lambda s: s["M"] < 3))
    assert (found["value"], found["least"], found["cases"], found["met"], found["peer"]) == (4.0, 2.0, 2, True, "a/b")


def test_goal_is_missed() -> None:
    assert only(Goal(1, "gemm", "fwd", ("a", "b"), 4.1, 5.0, where=lambda s: s["M"] < 3))["met"] is False


def test_share_takes_the_best_case() -> None:
    found = only(Goal(1, "gemm", "fwd", (), 0.6, 0.7, of="of_copy"))
    assert (found["value"], found["cases"], found["met"]) == (0.5, 1, False)


def test_first_result_counts_only_from_cold_caches() -> None:
    rows = [row(OURS, 1, 1, first_s=2.0), row("a", 1, 1, first_s=9.0)]
    goal = Goal(16, "gemm", "fwd", ("a",), 3, 3, of="first_s")
    assert [judge(rows, "cuda", cold, [goal])[0]["value"] for cold in (True, False)] == [4.5, None]


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    for goal in (
        Goal(1, "gemm", "fwd", ("c",), 1, 1),
        Goal(1, "gemm", "bwd", ("a",), 1, 1),
        Goal(1, "norm", "fwd", ("a",), 1, 1),
        Goal(1, "gemm", "fwd", ("a",), 1, 1, where=lambda s: s["M"] > 9),
    ):
        found = only(goal)
        assert (found["value"], found["cases"], found["met"]) == (None, 0, None)
    assert judge(ROWS, "cpu", goals=[goal]) == []


def test_cases_are_dealt_to_goals_in_turn_and_what_judges_none_comes_last() -> None:
    def case(name: str, m: int) -> tuple[str, Case]:
        return "gemm", Case(name, {"M": m}, torch.float32, lambda: Inputs(()), lambda inputs: None, {}, 0.0, 0)

    goals = [
        Goal(1, "gemm", "fwd", ("a",), 1, 1), Goal(2, "gemm", "bwd", ("a",), 1, 1),
        Goal(3, "gemm", "fwd", (), 1, 1, of="tflops", where=lambda s: s["M"] > 2),
        Goal(4, "gemm", "cold", ("a",), 1, 1, of="first_s"), Goal(5, "gemm", "cpu", ("a",), 1, 1, device="cpu"),
    ]  # fmt: skip
    listed = [case(*of) for of in (("cold", 1), ("cpu", 1), ("fwd", 1), ("fwd", 2), ("fwd", 3), ("bwd", 1), ("bwd", 2))]
    for cold, want in ((False, "fwd 1 fwd 3 bwd 1 fwd 2 bwd 2 cold 1 cpu 1"), (True, "cold 1 fwd 1 fwd 3 bwd 1")):
        found = " ".join(f"{case.name} {case.shape['M']}" for _, case in in_order(listed, "cuda", cold, goals))
        assert found.startswith(want)


def test_table_has_a_line_for_each_goal() -> None:
    for device in ("cuda", "cpu"):
        judged = judge([], device)
        assert len(table(judged).splitlines()) == 2 + len(judged) and "not measured" in table(judged)
    assert all(goal.aim >= goal.bar > 0 for goal in GOALS)
