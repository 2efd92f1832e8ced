"""Runs of lm_eval: the list's keys, the commands, and what happens without the package (a stub stands in for it)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import hbp_titan.evaluation
from hbp_titan.evaluation.harness import HarnessRun, read_runs, run_harness

PAPER_TASKS = Path(hbp_titan.evaluation.__file__).parent / "paper_tasks.toml"
STUB = """
import json, os, sys
out = sys.argv[sys.argv.index("--output_path") + 1]
os.makedirs(out)
json.dump([sys.argv[1:], os.environ.get("HF_ALLOW_CODE_EVAL")], open(out + "/called.json", "w"))
sys.exit(3 if "broken" in sys.argv else 0)
"""


def stub_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "site" / "lm_eval").mkdir(parents=True)
    (folder / "site" / "lm_eval" / "__init__.py").touch()
    (folder / "site" / "lm_eval" / "__main__.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))


def test_packaged_list_has_the_tasks_of_the_paper() -> None:
    runs = read_runs(Path("paper_tasks"))
    assert runs == read_runs(PAPER_TASKS)
    assert [run.name for run in runs] == ["mmlu", "bbh", "gsm8k", "ifeval", "humaneval", "longbench", "ruler"]
    assert [run.name for run in runs if run.runs_code] == ["humaneval"]


def test_commands_are_printed_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_lm_eval(tmp_path, monkeypatch)
    runs, lines = read_runs(PAPER_TASKS, ["ruler", "humaneval"]), []
    run_harness(runs, Path("the/hf"), tmp_path / "out", True, lines.append)
    code, ruler = (json.loads((tmp_path / "out" / name / "called.json").read_text()) for name in ("humaneval", "ruler"))
    assert ruler[0] == [
        *("--model", "hf", "--model_args", "pretrained=the/hf,dtype=bfloat16,max_length=131072"),
        *("--tasks", "ruler", "--batch_size", "auto", "--apply_chat_template", "--fewshot_as_multiturn"),
        *("--metadata", '{"max_seq_lengths": [32768, 131072]}', "--output_path", str(tmp_path / "out" / "ruler")),
    ]
    assert (code[1], ruler[1]) == ("1", None)
    assert code[0][-1] == "--confirm_run_unsafe_code"
    assert lines[0].startswith(f"HF_ALLOW_CODE_EVAL=1 {sys.executable} -m lm_eval --model hf --model_args pretrained=")


def test_failed_and_skipped_runs_do_not_end_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_lm_eval(tmp_path, monkeypatch)
    names: list[tuple[str, dict[str, Any]]] = [("a", {"arguments": ["broken"]}), ("code", {"runs_code": True})]
    runs = [HarnessRun(name, ["x"], **options) for name, options in [*names, ("b", {})]]
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"1 of 3 runs: a \(exit code 3\)"):
        run_harness(runs, Path("hf"), tmp_path / "out", False, lines.append)
    assert lines[3].startswith("skipped: code runs code")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b"}


def test_missing_lm_eval_raises_after_printing_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines: list[str] = []
    with pytest.raises(ValueError, match="not installed"):
        run_harness(read_runs(PAPER_TASKS, ["mmlu"]), Path("hf"), Path("out"), False, lines.append)
    assert "--tasks mmlu --batch_size auto --num_fewshot 5" in lines[0]


def test_model_code_needs_permission_and_commas_raise() -> None:
    runs = read_runs(PAPER_TASKS, ["humaneval"])
    with pytest.raises(ValueError, match="--run_code"):
        run_harness(runs, Path("hf"), Path("out"), False, lambda line: None)
    with pytest.raises(ValueError, match="comma"):
        run_harness(runs, Path("a,b"), Path("out"), True, lambda line: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[runs]", "TOML"),
        ("[runs]\nname = 'a'", "blocks"),
        ("[[runs]]\nname = 'a'", "lacks tasks"),
        ("[[runs]]\nname = 'a'\ntasks = 'mmlu'", "a list of strings"),
        ("[[runs]]\nname = 'a'\ntasks = ['b']\nnum_fewshots = 5", "did you mean num_fewshot"),
        ("[[runs]]\nname = 'a'\ntasks = ['b']\nnum_fewshot = true", "a whole number"),
        ("[[runs]]\nname = 'a'\ntasks = ['b']\n" * 2, "2 runs"),
        ("[[runs]]\nname = 'a'\ntasks = ['b']", "no run 'c'"),
    ],
)
def test_mistakes_in_the_list_raise(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(tmp_path / "t.toml", ["c"])
