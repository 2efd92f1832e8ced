"""The page of whole runs, of damaged ones, of several, and of very long ones."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.packing import load_plan, measure
from hbp_titan.report import read_runs, report_page
from scripts import report
from tests.report.sample_run import levels_of, start_of, step_of, write_run, write_usual_run


def _page(*folders: Path) -> str:
    return report_page(read_runs(folders))


def _rows(page: str, first_head: str) -> list[list[str]]:
    """Return the cells, as text, of the first table with this first head."""
    table = next(part for part in page.split("<table>") if f'<th scope="col">{first_head}</th>' in part)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("</table>")[0])[1:]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[html.unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in row] for row in cells]


def _sentences(page: str) -> str:
    return html.unescape(" ".join(re.findall(r'<p class="missing">(.*?)</p>', page)))


def test_level_table_has_a_row_per_level_and_one_for_all(tmp_path: Path) -> None:
    levels = [0] * 30 + [1] * 20
    page = _page(write_run(tmp_path, [step_of(step, level) for step, level in enumerate(levels, start=1)]))
    # 1000 tokens and half a second a step; four iterations of the lower level, one of the upper.
    table = next(part for part in page.split("<table>") if "share of time" in part)
    assert _rows("<table>" + table, "level") == [
        ["1K/cp1", "30", "120", "30,000", "15 s", "60.0%", "2,000", "40.0%", "20.00%", "5.0%", "20.00 GiB"],
        ["8K/cp2", "20", "20", "20,000", "10 s", "40.0%", "2,000", "40.0%", "20.00%", "5.0%", "30.00 GiB"],
        ["all", "50", "140", "50,000", "25 s", "100.0%", "2,000", "40.0%", "20.00%", "5.0%", "30.00 GiB"],
    ]


def test_planned_metrics_are_those_of_the_plan(tmp_path: Path) -> None:
    page = _page(write_usual_run(tmp_path))
    planned = measure(load_plan(tmp_path / "plan" / "epoch-0.safetensors"))
    whole, low, high = _rows(page, "plan")
    assert whole[:3] == ["epoch 0: hbp", f"{planned.iterations}", f"{planned.abr:.2%}"]
    assert whole[5] == f"{planned.cr:.2%}"
    assert [row[0] for row in (low, high)] == ["1K/cp1", "8K/cp2"]
    measured = next(part for part in page.split("<table>") if "Measured (planned)" in part)
    everything = _rows("<table>" + measured, "level")[-1]
    assert everything[2:5] == [
        f"4.00% ({planned.abr:.2%})",
        f"3.00% ({planned.time_imbalance:.2%})",
        f"20.00% ({planned.pr:.2%})",
    ]


def test_timeline_shows_the_curriculum_and_the_events(tmp_path: Path) -> None:
    lines = [step_of(step, level) for step, level in enumerate([0] * 10 + [1, 0] * 10, start=1)]
    lines[4] |= {"skipped": "the loss is not finite", "loss": None, "trained_tokens": 0}
    lines[9]["checkpoint_blocked_seconds"] = 0.5
    lines[19]["validation"] = {"loss": 2.5}
    page = _page(write_run(tmp_path, lines, [start_of(), start_of(11, 2)]))
    lane = page.split('class="lane tall"')[1].split("</svg>")[0]
    bands = re.findall(r'x="([\d.]+)" width="([\d.]+)" y="[\d.-]+" height="([\d.]+)" fill="var\(--c(\d)\)"', lane)
    # The first third trains the lower level, then levels alternate.
    assert (bands[0][0], bands[0][2], bands[0][3]) == ("0.00", "100.0", "0")
    assert float(bands[0][1]) == pytest.approx(1000 / 3, abs=0.5)
    assert [band[3] for band in bands] == ["0", *"10" * 10]
    for name in ("validations (1)", "checkpoints (1)", "resumes (1)", "skipped steps (1)"):
        assert f">{name}</span>" in page
    for tip in ("step 5: the loss is not finite", "resumed with step 11 on 2 ranks", "step 20: 2.5000"):
        assert f"<title>{tip}</title>" in page
    assert _rows(page, "skipped step") == [["5", "the loss is not finite"]]


def test_bare_run_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n{"st')
    page = _page(tmp_path)
    notes = _sentences(page)
    for word in ("run.json does not exist", "plan/ contains no", "incomplete", "level", "no step times"):
        assert word in notes, word
    assert _rows(page, "loss") == [["all", "2", "2.3750", "2.3750", "+0.0000"]]


WRONG: list[Any] = [None, "x", 3, -1, 0, [], {}, {"a": {}}, {"a": 1}, {"a": {"loss": None}}, True, 1e299, 10**400]


@pytest.mark.parametrize("shift", range(len(WRONG)))
def test_values_of_any_type_still_give_a_page(tmp_path: Path, shift: int) -> None:
    lines = [step_of(step, 0) for step in (99, 100, 101)]
    for line in lines[shift % 2 :]:
        for at, key in enumerate(sorted(line)):
            if key != "step" and at % 3 == shift % 3:
                line[key] = WRONG[(at + shift) % len(WRONG)]
    run = write_run(tmp_path, lines, [{**start_of(), "config": WRONG[shift]}, {**start_of(), "code": WRONG[shift]}])
    page = _page(run)
    assert "Curriculum" in page
    assert "nan" not in page.split("<style>")[1].split("</style>")[1].split("<script>")[0]


@pytest.mark.parametrize("key", sorted(step_of(100, 0)))
def test_any_key_can_be_missing(tmp_path: Path, key: str) -> None:
    lines = [step_of(step, 0) for step in (99, 100, 101)]
    for line in lines:
        if key != "step":
            line.pop(key, None)
    run = write_run(tmp_path, lines)
    assert "Curriculum" in _page(run)


def test_page_has_every_plot_requests_nothing_and_keeps_hostile_names_as_text(tmp_path: Path) -> None:
    hostile = "</script><script>hacked()</script><img src=x onerror=hacked()>\"' onload=hacked()"
    runs = [write_usual_run(tmp_path / "a"), write_usual_run(tmp_path / "b", 60, sources=(hostile, "books"))]
    page = _page(*runs)
    tags: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(page)
    assert [tag for tag, _ in tags].count("script") == 1
    assert not {"img", "link", "iframe"} & {tag for tag, _ in tags}
    assert {str(attributes[name])[:1] for _, attributes in tags for name in ("src", "href") if name in attributes} == {
        "#"
    }
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert hostile in html.unescape(page)
    # Seven of the comparison; per run one of held-out loss, four of loss, two of groups, three of validation, four of
    # speed, one of ranks, two of timing checks, three of balance, two of memory.
    assert sum(attributes.get("class") == "chart" for _, attributes in tags) == 7 + 2 * 22


def test_eight_sources_have_a_color_each_and_the_ninth_is_named_as_missing(tmp_path: Path) -> None:
    names = tuple(f"source{number}" for number in range(9))
    page = _page(write_usual_run(tmp_path / "run", sources=names))
    for title in ("Loss by source", "Validation loss by source"):
        figure = next(part for part in page.split("<figure>") if f'aria-label="{title}"' in part)
        legend = re.findall(r'var\(--c(\d)\)"></s>(\w+)', figure)
        assert legend == [(str(number), names[number]) for number in range(8)]
        assert "table has 1 more" in figure


def test_new_run_and_corrupt_files_are_noted(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_text(json.dumps({"starts": [start_of()]}))
    assert "no step has been trained" in _sentences(_page(begun))
    damaged = write_usual_run(tmp_path / "damaged", 10)
    (damaged / "run.json").write_text('{"starts": 3}')
    (damaged / "plan" / "epoch-0.safetensors").write_bytes(b"half")
    (damaged / "metrics.jsonl").write_text("lost\n" + json.dumps(step_of(2, 0)) + "\n")
    notes = _sentences(_page(damaged))
    for word in ("run.json is corrupt", "epoch-0.safetensors is corrupt", "1 lines of metrics.jsonl"):
        assert word in notes, word


def test_starts_come_from_the_sample_log_without_run_json(tmp_path: Path) -> None:
    run = write_usual_run(tmp_path, 40)
    (run / "run.json").unlink()
    for count, first in enumerate((1, 21), start=1):
        start = run / "sample_log" / f"start-{count:04}"
        start.mkdir(parents=True)
        (start / "start.json").write_text(json.dumps({"first_step": first, "world_size": 4}))
    assert "resumed with step 21 on 4 ranks" in _page(run)


def test_runs_with_the_same_name_get_their_parent_folder(tmp_path: Path) -> None:
    runs = [write_usual_run(tmp_path / name / "run", 5) for name in ("left", "right")]
    assert [run.name for run in read_runs(runs)] == ["left/run", "right/run"]


def test_mixed_step_is_divided_by_micro_batches(tmp_path: Path) -> None:
    mixed = {**step_of(1, 0), "level": None, "level_name": "1K/cp1+8K/cp2", "micro_batches": 5}
    mixed["loss_by_level"] = {"1K/cp1": 2.0, "8K/cp2": 3.0}
    part = mixed["per_level"]["1K/cp1"]
    mixed["per_level"] = {"1K/cp1": {**part, "micro_batches": 4}, "8K/cp2": {**part, "micro_batches": 1}}
    lane = _page(write_run(tmp_path, [mixed])).split('class="lane tall"')[1].split("</svg>")[0]
    assert re.findall(r'height="([\d.]+)" fill="var\(--c\d\)"', lane) == ["80.0", "20.0"]


def test_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    def lines(factor: float) -> list[dict[str, Any]]:
        return [
            {**step_of(step, 0), "loss": 2 * factor, "tokens_per_second": 2000 / factor, "step_seconds": 0.5 * factor}
            for step in range(1, 21)
        ]

    runs = [write_run(tmp_path / name, lines(factor)) for name, factor in (("one", 1.0), ("two", 1.25))]
    page = _page(*runs)
    rows = {row[0]: row[1:] for row in _rows(page, "")}
    assert rows["training loss"] == ["2.0000", "2.5000 (1.250x)"]
    assert rows["time in steps"] == ["10 s", "12 s (1.250x)"]
    assert rows["tokens per second"] == ["2,000", "1,600 (0.800x)"]
    assert page.count("<article") == 2
    over_tokens = page.split('aria-label="Loss over tokens"')[1].split("</svg>")[0]
    assert re.findall('data-name="([^"]*)"', over_tokens) == ["one", "two"]


def test_page_of_30_000_steps_stays_small(tmp_path: Path) -> None:
    line = (
        '{"step": %d, "epoch": 0, "level": %d, "level_name": "%s", "micro_batches": 1, "loss": %.4f, "loss_by_level": '
        '{"%s": %.4f}, "grad_norm": %.3f, "tokens": 1000, "trained_tokens": 800, "tokens_per_second": 2000.5, '
        '"padding": 1.5, "step_seconds": %.3f}\n'
    )
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, level in enumerate(levels_of(30_000), start=1):
            loss = 2 + 6 / step**0.5 + step * 37 % 101 / 300
            name = ("1K/cp1", "8K/cp2")[level]
            file.write(line % (step, level, name, loss, name, loss, loss / 9, 0.5 + step % 7 / 50))
    page = _page(tmp_path)
    assert len(page) < 2_000_000
    assert "30,000 steps, a column is 62.5 steps" in page
    loss_plot = page.split('aria-label="Loss"')[1].split("</svg>")[0]
    longest = max(len(points.split()) for points in re.findall('points="([^"]*)"', loss_plot))
    assert 500 < longest < 700


def test_folders_without_a_run_raise(tmp_path: Path) -> None:
    def error(*folders: Path) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            read_runs(folders)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "empty is not a run folder" in error(tmp_path / "empty")
    assert "gone is not a directory" in error(tmp_path / "gone")
    run = write_usual_run(tmp_path / "run", 5)
    assert "is given twice" in error(run, run)


def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_usual_run(tmp_path / "run", 5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    report.main([str(run)])
    output = capsys.readouterr().out
    assert "incomplete" in output
    assert output.endswith(f"wrote {run / 'report.html'}\n")
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    with pytest.raises(ValueError, match="run folder"):
        report.main([str(tmp_path)])


def test_expert_section_only_with_experts(tmp_path: Path) -> None:
    plain = [step_of(step, 0) for step in range(1, 31)]
    assert ">Experts</h3>" not in _page(write_run(tmp_path / "dense", plain))
    loads = [{"worst": 2.0 + (step == 7), "mean": 1.5, "idle": 0, "ranks": 1.25} for step in range(30)]
    lines = [{**line, "expert_load": load} for line, load in zip(plain, loads, strict=True)]
    lines[19]["tokens_per_expert"] = {"0": [10, 30, 20, 20], "1": [80, 0, 0, 0]}
    page = _page(write_run(tmp_path / "experts", lines))
    assert _rows(page, "load")[0] == ["worst layer", "3.00", "2.00", "2.00"]
    table = page.split('aria-label="Experts of each layer at step 20"')[1].split("</svg>")[0]
    # Most loaded first, as a multiple of the layer's mean of 20 tokens.
    assert re.findall('data-name="([^"]*)".*? data-y="([^"]*)"', table) == [
        ("layer 0", "1.5 1 1 0.5"),
        ("layer 1", "4 0 0 0"),
    ]
    # 4 experts of 20 tokens: 1.5 and 4 times the mean. No expert parallelism, so no ranks.
    assert _map(page, "Most loaded expert by layer") == {"step 20, layer 0": "1.5", "step 20, layer 1": "4"}
    assert _map(page, "Experts without a token by layer") == {"step 20, layer 0": "0", "step 20, layer 1": "3"}
    assert "Most loaded rank by layer" not in page


def test_loads_of_expert_parallel_ranks_are_mapped_by_layer(tmp_path: Path) -> None:
    load = {"worst": 2.0, "mean": 1.5, "idle": 0, "ranks": 1.5}
    tables = [[30, 30, 10, 10], [10, 10, 30, 30]]
    lines = [
        {**step_of(step, 0), "expert_load": load, "tokens_per_expert": {"3": tables[step % 2], "4": tables[0]}}
        for step in range(1, 5)
    ]
    start = {**start_of(), "config": {"parallelism": {"expert_parallel_degree": 2}}}
    page = _page(write_run(tmp_path / "experts", lines, [start]))
    # 60 of 80 tokens on one of two ranks: 1.5 times the mean.
    ranks = _map(page, "Most loaded rank by layer")
    assert ranks == {f"step {step}, layer {layer}": "1.5" for step in range(1, 5) for layer in (3, 4)}
    # Layer 3 loads another rank in every second step.
    assert _map(page, "Load of each rank, mean of the steps") == {
        "rank 0, layer 3": "1.000", "rank 1, layer 3": "1.000", "rank 0, layer 4": "1.500", "rank 1, layer 4": "0.500",
    }  # fmt: skip


def _map(page: str, title: str) -> dict[str, str]:
    """Return the value of each field of a map by its place."""
    svg = page.split(f'aria-label="{title}"')[1].split("</svg>")[0]
    return dict(tip.split(": ") for tip in re.findall("<title>([^<]*)</title>", svg))
