"""Precedence, round trip and the one clear error of each mistake."""

from __future__ import annotations

import ast
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.config import CHOICES, JobConfig, help_text, load_config, to_toml, validate
from hbp_titan.packing import METHODS, Level

ROOT = Path(__file__).resolve().parents[1]
TOML = """
[optimizer]
lr = 1e-4
beta2 = 0.9

[[levels]]
max_tokens = 1024
ac_policy = "full"

[[levels]]
max_tokens = 8192
cp_degree = 2
ac_policy = "none"
"""


def _write(folder: Path, text: str) -> list[str]:
    path = folder / "run.toml"
    path.write_text(text)
    return ["--job.config_file", str(path)]


def test_command_line_beats_toml_beats_default(tmp_path: Path) -> None:
    config = load_config([*_write(tmp_path, TOML), "--optimizer.lr", "1e-3", "--compile.enable=true"])
    assert (config.optimizer.lr, config.optimizer.beta2, config.optimizer.beta1) == (1e-3, 0.9, 0.9)
    assert config.compile.enable is True
    assert config.levels == [Level(1024, 1, ac_policy="full"), Level(8192, 2, ac_policy="none")]
    assert config.dump_folder == Path("outputs/run")


def test_template_variables_and_date_come_from_toml(tmp_path: Path) -> None:
    text = "[data]\ntemplate_date = 2025-01-31\n[data.chat_template_kwargs]\nenable_thinking = false\n"
    data = load_config(_write(tmp_path, text)).data
    assert (data.template_date, data.chat_template_kwargs) == ("2025-01-31", {"enable_thinking": False})


def test_sources_of_a_mixture_read_back_equal(tmp_path: Path) -> None:
    text = """
    [data]
    cache_folder = "c"
    [[data.sources]]
    path = "tulu3"
    name = "tulu3"
    weight = 0.8
    columns = { messages = "dialog", content = "text" }
    roles = { "the bot" = "assistant" }
    [[data.sources]]
    path = "longcite.jsonl.gz"
    repeat = 2
    [training]
    epochs = 2
    [[levels]]
    max_tokens = 8192
    cp_degree = 2
    """
    config = load_config(_write(tmp_path, text))
    assert [source.path for source in config.data.sources] == ["tulu3", "longcite.jsonl.gz"]
    assert config.data.sources[0].columns == {"messages": "dialog", "content": "text"}
    assert config.data.sources[1].repeat == 2
    again = load_config(_write(tmp_path, to_toml(config)))
    assert again == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimiser]\nlr = 1.0", r"unknown section \[optimiser\]; did you mean optimizer\?"),
        ("[optimizer]\nlearning_rate = 1.0", "unknown key optimizer.learning_rate"),
        ("[training]\nstep = 1", r"unknown key training.step; did you mean training.steps\?"),
        ("[training]\nsteps = 'ten'", "training.steps = 'ten' must be of type int"),
        ("[training]\nsteps = true", "training.steps = True must be of type int"),
        ("[training]\nsteps = -1", "training.steps = -1 must not be negative"),
        ("[training]\nepochs = 0", "training.epochs = 0 must be at least 1"),
        ("[parallelism]\ntrain_timeout_seconds = 0", "train_timeout_seconds = 0 must be at least 1"),
        ("[training]\nmax_norm = nan", "training.max_norm = nan must not be"),
        ("[optimizer]\nlr = inf", "optimizer.lr = inf must not be"),
        ("[optimizer]\nbeta2 = 1.0", "optimizer.beta2 = 1.0 must be below 1"),
        ("[optimizer]\neps = 0.0", "optimizer.eps = 0"),
        ("[data]\ntrain_files = [1]", r"data.train_files = \[1\] must be of type list\[str\]"),
        ("[[levels]]\nmax_token = 8", r"unknown key levels.max_token; did you mean max_tokens\?"),
        ("[[levels]]\ncp_degree = 2", "max_tokens"),
        ("[[levels]]\nmax_tokens = 9\ncp_degree = 2", "not divisible"),
        ("[[levels]]\nmax_tokens = 8\nac_policy = 'some'", "ac_policy='some'"),
        ("[packing]\nlevel_order = 'random'", "packing.level_order = 'random': must be one of"),
        ("[[data.sources]]\nname = 'a'", r"data.sources\[1\] has no path"),
        ("[[data.sources]]\npath = 'a'\nrepeats = 2", r"unknown key data.sources\[1\].repeats; did you mean repeat\?"),
        ("[[data.sources]]\npath = 'a'\nweight = nan", r"data.sources\[1\].weight = nan must be a number"),
        ("[[data.sources]]\npath = 'a'\nrepeat = 0", r"data.sources\[1\].repeat = 0 trains nothing"),
        ("[[data.sources]]\npath = 'a'\nlimit = -1", r"data.sources\[1\].limit = -1 must be a number of at least 0"),
        ("[[data.sources]]\npath = 'a'\ncolumns = {role = 1}", r"data.sources\[1\].columns = .* must be of type"),
        ("[data]\nsources = ['a']", r"data.sources must be \[\[data.sources\]\] blocks"),
        ("[data]\nmax_length_policy = 'split'\ntrain_on = 'last'", "would train the last turn of every piece"),
        ("[data]\ntemplate_date = 2024-02-30", "not valid TOML"),
        ("[data]\ntemplate_date = '2024-02-30'", "data.template_date = '2024-02-30' must be a day"),
        ("[data]\ntemplate_date = '20240226'", "data.template_date = '20240226' must be a day"),
        ("[data.chat_template_kwargs]\nday = 2024-02-26", "data.chat_template_kwargs = .* must have JSON values"),
        ("[data]\nchat_template_kwargs = 1", "data.chat_template_kwargs = 1 must be of type"),
        ("steps = 1", r"unknown section \[steps\]"),
        ("[training\n", "not valid TOML"),
    ],
)
def test_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--job.config_file", "missing.toml"], "no such config file"),
        (["--lora.rank=-1"], r"lora\.rank"),
        (["--lora.rank=4", "--lora.alpha=0"], r"lora\.alpha"),
        (["--lora.rank=4", "--lora.target_modules=[]"], "target_modules"),
        (["--lora.target_modules=all-linear,q_proj"], "all-linear"),
        (["--lora.dropout=0.1"], r"lora\.dropout"),
        (["--packing.auto_levels=true", "--levels=128:1"], "auto_levels"),
        (["--packing.auto_levels=best"], "bool"),
        (["--training.stepz", "3"], r"command line: unknown key training.stepz; did you mean training.steps\?"),
        (["--training.steps"], "--training.steps has no value"),
        (["training.steps"], "unexpected argument 'training.steps'"),
        (["--levels", "1024:x"], "'1024:x'"),
        (["--levels", "1024:2:rings"], "cp_style='rings'"),
        (["--levels", "64:1:ulysses:full:2:true:3:4:5:6"], "'64:1:ulysses:full:2:true:3:4:5:6'"),
        (["--compile.enable=true", "--parallelism.cp_backend=dtensor"], "compile.enable with parallelism.cp_backend"),
        (["--training.gradient_dtype=bfloat16", "--training.global_batch_tokens=9"], "gradient_dtype"),
        (["--optimizer.name=adamw8bit", "--optimizer.state_dtype=bfloat16"], "state_dtype"),
        (["--optimizer.name=adamw8bit", "--parallelism.cpu_offload=true"], "cpu_offload"),
        (["--optimizer.momentum=0.9"], "momentum"),
    ],
)
def test_mistake_on_the_command_line_is_named(argv: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_config(argv)


def test_levels_in_short_form_have_the_fields_of_a_level_in_their_order() -> None:
    config = load_config(["--levels", "64,128:2,256:4:hybrid,512:4:allgather:full,1024:8:ulysses:keep_attention:3"])
    assert config.levels == [
        Level(64),
        Level(128, 2),
        Level(256, 4, "hybrid"),
        Level(512, 4, "allgather", "full"),
        Level(1024, 8, "ulysses", "keep_attention", 3),
    ]


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (["--levels=8:2"], 3, "cp_degree=2 of the level with max_tokens=8 does not divide the world size 3"),
        (["--levels=10:5"], 12, "use 1, 2, 3, 4, 6, 12,"),
        (["--levels=8,8"], 2, "levels must ascend: max_tokens=8 follows max_tokens=8"),
        (["--parallelism.dp_replicate=1"], 2, "none given"),
        (["--levels=8", "--parallelism.dp_replicate=3"], 4, "dp_replicate = 3 does not divide the world size 4"),
    ],
)
def test_levels_and_copies_that_do_not_fit_the_world_raise(words: list[str], world_size: int, message: str) -> None:
    config = load_config(["--data.train_files=a.jsonl", *words])
    with pytest.raises(ValueError, match=message):
        validate(config, world_size)


def test_command_line_drops_the_sources_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[[data.sources]]\npath = 'tulu3'\n")
    config = load_config(["--job.config_file", str(path), "--data.sources=[]", "--data.train_files=mine.jsonl"])
    assert (config.data.sources, config.data.train_files) == ([], ["mine.jsonl"])
    with pytest.raises(ValueError, match=r"data.sources takes"):
        load_config(["--data.sources=mine.jsonl"])


def test_help_explains_every_key() -> None:
    text = help_text()
    assert "--lr_scheduler.decay str" in text
    assert "cosine, linear or constant." in text


PRESETS = sorted(Path(__file__).resolve().parents[1].glob("train_configs/*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_each_preset_loads_and_fits_its_world(path: Path) -> None:
    config = load_config(["--job.config_file", str(path)])
    assert config.packing.method in METHODS
    few, side_by_side = path.stem == "debug_model", config.packing.level_order == "parallel"
    for world_size in (2,) if few else (32, 512) if side_by_side else (8, 32, 256):
        validate(config, world_size)


def _keys() -> list[tuple[str, str, Any]]:
    """Return (section, key, default) of every key but the config file's own."""
    config = JobConfig()
    return [
        (section.name, item.name, getattr(getattr(config, section.name), item.name))
        for section in dataclasses.fields(JobConfig)
        if section.name != "levels"
        for item in dataclasses.fields(getattr(config, section.name))
        # Blocks have no form on the command line; test_sources_of_a_mixture_read_back_equal has them.
        if item.name not in ("config_file", "sources", "validation_sources")
    ]


def _other(section: str, key: str, default: Any) -> Any:
    """Return a valid value of the key that is not its default."""
    choices = CHOICES.get(f"{section}.{key}")
    if choices:
        return next([choice] if isinstance(default, list) else choice for choice in choices if choice != default)
    if default is None:
        return 7
    if isinstance(default, bool):
        return not default
    if key == "template_date":
        return "2025-01-31"
    if isinstance(default, str):
        return "other"
    if isinstance(default, dict):
        return {"other": [1.5, False]}
    if isinstance(default, list):
        return ["other"]
    if isinstance(default, float) or key == "share":
        return 0.5 * (default or 1)
    return default + 3


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {json.dumps(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


NEEDS = {
    "optimizer.momentum": ("optimizer.name", "muon"),
    "model.backend": ("model.hf_path", "folder"),
    "validation.enable": ("validation.share", 0.1),
    "profiling.enable_profiling": ("profiling.last_step", 99),
}
"""Another key that a value needs next to it."""


@cache
def _reads() -> set[tuple[str, str]]:
    """Return (section, key) of every attribute of a section that the package reads, outside of the configuration.

    A section is `<anything>.section`, a name that was assigned from one, or a parameter annotated with its class. So a
    key is not found by an attribute of the same name of something else.
    """
    classes = {item.type: item.name for item in dataclasses.fields(JobConfig)}
    # JobConfig.seed_of reads it.
    found = {("training", "rng_seed")}
    for path in (ROOT / "hbp_titan").rglob("*.py"):
        if path.name in ("job_config.py", "config.py"):
            continue
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        names = {alias.asname: alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        sections: dict[str, set[str]] = {}
        for node in nodes:
            if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name):
                section = classes.get(names.get(node.annotation.id, node.annotation.id))
                if section:
                    sections.setdefault(node.arg, set()).add(section)
        for node in nodes:
            if isinstance(node, ast.Assign):
                target = node.targets[0]
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = [*zip(target.elts, node.value.elts, strict=True)]
                for name, value in pairs:
                    if isinstance(value, ast.Attribute) and value.attr in classes.values():
                        sections.setdefault(_last_name(name), set()).add(value.attr)
                    elif isinstance(value, ast.Name) and value.id in sections:
                        sections.setdefault(_last_name(name), set()).update(sections[value.id])
        for node in nodes:
            if isinstance(node, ast.Attribute):
                owner = _last_name(node.value)
                own = {owner} if isinstance(node.value, ast.Attribute) and owner in classes.values() else set()
                found |= {(section, node.attr) for section in sections.get(owner, set()) | own}
    return found


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def test_a_key_is_not_taken_for_that_of_another_section() -> None:
    # Both names are read, each from its own section only.
    assert {("packing", "method"), ("training", "steps")} <= _reads()
    assert not {("training", "method"), ("packing", "steps"), ("job", "policy")} & _reads()


@pytest.mark.parametrize(("section", "key", "default"), _keys(), ids=lambda value: str(value)[:20])
def test_every_key_has_an_effect_from_toml_and_the_command_line(
    section: str, key: str, default: Any, tmp_path: Path
) -> None:
    value = _other(section, key, default)
    pairs = [NEEDS[f"{section}.{key}"]] if f"{section}.{key}" in NEEDS else []
    pairs.append((f"{section}.{key}", value))
    words = [f"--{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in pairs]
    text = "\n".join([f"[{section}]", *(f"{name.partition('.')[2]} = {_toml(v)}" for name, v in pairs)])
    for config in (load_config(words), load_config(_write(tmp_path, text))):
        assert getattr(getattr(config, section), key) == value
        again = load_config(_write(tmp_path, to_toml(config)))
        assert getattr(again, section) == getattr(config, section) or section == "job"
    assert (section, key) in _reads(), f"nothing reads {section}.{key}"
