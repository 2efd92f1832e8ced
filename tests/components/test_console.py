"""Lines of at most 80 columns, whatever they have to hold."""

from __future__ import annotations

from typing import Any

from hbp_titan.components.metrics import flow, step_line, wrap

RECORD: dict[str, Any] = {
    "step": 12345,
    "level_name": "128K/cp16",
    "loss": 1.23456,
    "grad_norm": 0.51234,
    "tokens_per_second": 1.234e6,
    "mfu": 41.26,
    "idle_share": 0.123,
    "peak_memory_gib": 71.24,
}


def test_a_long_line_gives_up_its_least_needed_parts() -> None:
    assert step_line(RECORD, 99999, 43210.0) == (
        "12345/99999  128K/cp16  loss 1.2346  1.23M tok/s  mfu 41.3%  eta 12:00:10"
    )
    mixed = {**RECORD, "level_name": "16K/cp1+32K/cp2+128K/cp16", "expert_load": {"worst": 1.5}}
    assert len(step_line(mixed, 99999, 43210.0)) <= 80


def test_a_short_line_has_all_of_them_and_what_is_not_finite_is_nan() -> None:
    small = {"step": 7, "level_name": "8K/cp2", "loss": None, "grad_norm": None, "mfu": None, "peak_memory_gib": 7.12}
    assert step_line({**RECORD, **small}, 58, 61.0) == (
        " 7/58  8K/cp2  loss    nan  grad   nan  1.23M tok/s  idle 12%  7.1G  eta 0:01:01"
    )


def test_long_lines_are_broken_and_indented() -> None:
    text = "short\n" + "word " * 20 + "\n" + "x" * 90
    lines = wrap(text).splitlines()
    assert lines[0] == "short"
    assert lines[2].startswith("    word")
    assert lines[3] == "x" * 90
    assert max(map(len, lines[:3])) <= 80


def test_parts_fill_indented_lines() -> None:
    assert flow(["a" * 40, "b" * 30, "c" * 10]) == ["    " + "a" * 40 + "   " + "b" * 30, "    " + "c" * 10]
    assert flow([]) == []
