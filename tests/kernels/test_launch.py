"""Which chip's entries of a launch table serve which chip."""

from __future__ import annotations

import pytest
from minids_kernels import _launch


@pytest.mark.parametrize(
    ("arch", "used"),
    [("sm_80", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"), ("sm_100", "sm_100"), ("sm_120", "sm_100"),
     ("sm_75", "sm_80"), ("gfx942", "sm_80")],
)  # fmt: skip
def test_own_entries_else_the_nearest_older_chips_else_the_oldest(
    arch: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"kernel": {name: [{"shape": {}, "config": {"of": name}}] for name in ("sm_100", "sm_80", "sm_90")}}
    monkeypatch.setattr(_launch, "_table", lambda room: table)
    assert [entry["config"]["of"] for entry in _launch.entries("room", "kernel", arch)] == [used]


def test_an_entry_is_near_by_the_ratio_of_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"shape": {"M": m}, "config": {"of": m}} for m in (15, 255)]
    monkeypatch.setattr(_launch, "_table", lambda room: {"kernel": {"sm_80": entries}})
    assert [_launch.config("of this test", "kernel", "sm_80", M=m)["of"] for m in (0, 60, 65, 9999)] == [
        15,
        15,
        255,
        255,
    ]
