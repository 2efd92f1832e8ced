"""The files of saved data sets and dataset repositories are those that `datasets` finds."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from hbp_titan.data.files import source_files
from hbp_titan.data.rows import count_rows, index_rows, read_records
from hbp_titan.job_config import DataSource

datasets: Any = None


@pytest.fixture(autouse=True, scope="module")
def _import_datasets() -> None:
    """Import `datasets` only in the process that runs these tests."""
    global datasets
    import datasets

    datasets.disable_progress_bars()


def read(tmp_path: Path, **source: Any) -> list[Any]:
    files = source_files(DataSource(**{"path": str(tmp_path / "data"), **source}), "data.sources[0]").files
    return [record for file in files for _, record in read_records(index_rows(file, tmp_path / "u"), 1 << 20)]


def oracle(tmp_path: Path, name: str | None = None, split: str = "train") -> list[Any]:
    loaded = datasets.load_dataset(str(tmp_path / "data"), name, split=split, cache_dir=str(tmp_path / "cache"))
    return loaded.to_list()


def make(tmp_path: Path, names: list[str], readme: str = "") -> Path:
    """Write a repository; each file has two rows with its name."""
    for name in names:
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"file": name, "row": row} for row in (0, 1)]
        if name.endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(str(file))
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    if readme:
        (tmp_path / "data" / "README.md").write_text(readme)
    return tmp_path / "data"


def test_a_saved_data_set_has_its_rows(tmp_path: Path) -> None:
    rows = [{"n": number} for number in range(20)]
    datasets.Dataset.from_list(rows).select(range(19, -1, -1)).save_to_disk(str(tmp_path / "data"), num_shards=12)
    assert read(tmp_path) == datasets.load_from_disk(str(tmp_path / "data")).to_list() == rows[::-1]
    with pytest.raises(ValueError, match="one saved split"):
        read(tmp_path, split="test")


def test_a_saved_dict_of_data_sets_has_its_splits(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"split": name}]) for name in ("train", "test_sft")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    for name in splits:
        assert read(tmp_path, split=name) == datasets.load_from_disk(str(tmp_path / "data"))[name].to_list()
    with pytest.raises(ValueError, match=r"^data.sources\[0\]: .*no split validation; it has train, test_sft"):
        read(tmp_path, split="validation")
    with pytest.raises(ValueError, match="saved data set"):
        read(tmp_path, config="x")


LAYOUTS = {
    "shards": [
        "data/train-00001-of-00002.parquet",
        "data/train-00000-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ],
    "shards of any split": ["data/train_sft-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"],
    "file names": ["train.jsonl", "dev.jsonl", "my_test.jsonl"],
    "numbered": ["train_10.jsonl", "train_2.jsonl", "train-1.jsonl", "sub/train.3.jsonl", "validation.jsonl"],
    "folder names": ["train/b.jsonl", "train/a/c.jsonl", "train-2/a.jsonl", "val/x.jsonl", "other.jsonl"],
    "no split is named": ["b.jsonl", "a.jsonl", "sub/c.jsonl", "trainer.jsonl", "latest.jsonl"],
    "packed": ["train.jsonl.gz", "test.jsonl.gz"],
    "hidden": [
        "train.jsonl",
        ".cache/train.jsonl",
        "__pycache__/train.jsonl",
        ".train.jsonl",
        "sub/dataset_infos.json",
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repository_without_configurations_has_the_rows_that_datasets_finds(tmp_path: Path, layout: str) -> None:
    make(tmp_path, LAYOUTS[layout])
    expected = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    for split in expected:
        assert read(tmp_path, split=split) == expected[split].to_list()
    with pytest.raises(ValueError, match=f"no split nothing; .*{next(iter(expected))}"):
        read(tmp_path, split="nothing")


@pytest.mark.parametrize(
    ("names", "split", "unread"),
    [
        (["code_train.jsonl", "math.jsonl"], "train", {"math.jsonl": "in no split"}),
        (
            ["train.jsonl", "dev.jsonl", "a.jsonl"],
            "train",
            {"a.jsonl": "in no split", "dev.jsonl": "of split validation"},
        ),
        (["data/train-00000-of-00001.jsonl", "extra.jsonl"], "train", {"extra.jsonl": "in no split"}),
        (["train/a.jsonl", "b.jsonl"], "train", {"b.jsonl": "in no split"}),
        (["a.jsonl", "b.jsonl.xz", "README.md", "c.txt"], "train", {"b.jsonl.xz": "of a type that is not read"}),
        (["train.jsonl", "test.jsonl"], "test", {"train.jsonl": "of split train"}),
        (["a.jsonl", "b.jsonl", ".c.jsonl", "dataset_infos.json"], "train", {}),
    ],
)
def test_files_of_a_folder_that_are_not_read_are_returned_with_the_reason(
    tmp_path: Path, names: list[str], split: str, unread: dict[str, str]
) -> None:
    folder = make(tmp_path, names)
    found = source_files(DataSource(path=str(folder), split=split), "key")
    assert found.unread == {folder / name: reason for name, reason in unread.items()}


def test_files_of_other_configurations_and_saved_splits_are_named(tmp_path: Path) -> None:
    configs = "- {config_name: default, data_files: one/a.jsonl}\n- {config_name: b, data_files: one/b.jsonl}\n"
    folder = make(tmp_path, ["one/a.jsonl", "one/b.jsonl", "c.jsonl"], f"---\nconfigs:\n{configs}---\n")
    assert source_files(DataSource(path=str(folder)), "key").unread == {
        folder / "one/b.jsonl": "of configuration b",
        folder / "c.jsonl": "in no split",
    }
    saved = tmp_path / "saved"
    splits = {name: datasets.Dataset.from_list([{"split": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(saved))
    for name in ("cache-1f.arrow", "more.jsonl"):
        (saved / "train" / name).write_text("{}")
    (saved / "new.jsonl").write_text("{}")
    assert source_files(DataSource(path=str(saved)), "key").unread == {
        saved / "new.jsonl": "in no split",
        saved / "test/data-00000-of-00001.arrow": "of split test",
        saved / "train/more.jsonl": "of split train",
    }
    with pytest.raises(ValueError, match="has saved data sets, saved/test, saved/train"):
        source_files(DataSource(path=str(tmp_path)), "key")


def test_a_split_without_files_is_reported_with_the_files_and_what_to_write(tmp_path: Path) -> None:
    folder = make(tmp_path, ["part-1.jsonl", "unit_test_questions.jsonl"])
    message = (
        r"no split train; it has test \(unit_test_questions.jsonl\); in no split: part-1.jsonl; .*data/\*.jsonl\"$"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    assert len(read(tmp_path, path=f"{folder}/*.jsonl")) == 4


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl", "train.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/c*.jsonl*", ["sub/c.jsonl.gz", "sub/deep/c2.jsonl"]),
        ("[x].jsonl", ["[x].jsonl"]),
    ],
)
def test_a_pattern_is_every_file_that_it_matches_in_order(tmp_path: Path, pattern: str, names: list[str]) -> None:
    make(tmp_path, ["train.jsonl", "b.jsonl", "a.jsonl", "sub/c.jsonl.gz", "sub/deep/c2.jsonl"])
    if pattern == "[x].jsonl":
        make(tmp_path, ["[x].jsonl", "x.jsonl"])
    rows = read(tmp_path, path=str(tmp_path / "data" / pattern))
    assert rows == [{"file": name, "row": row} for name in names for row in (0, 1)]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/my_data", "my_data"),
        ("org/my_data/", "my_data"),
        ("hub/datasets--org--my.data/snapshots/1a2b", "my.data"),
        ("tulu3/data", "data"),
    ],
)
def test_a_folder_names_its_rows(tmp_path: Path, path: str, name: str) -> None:
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / path / "train-00000-of-00001.jsonl").write_text("{}\n")
    assert source_files(DataSource(path=f"{tmp_path}/{path}"), "key").name == name
    assert source_files(DataSource(path=f"{tmp_path}/{path}/*.jsonl"), "key").name == ""


NAMES = ["one/b.jsonl", "one/a.jsonl", "one/deep/c.jsonl", "two/d.jsonl", "two/e1.jsonl", "two/e2.jsonl"]
DATA_FILES = {
    "a path": '"two/d.jsonl"',
    "a glob": '"*/[b-d].jsonl"',
    "a list": '["two/e?.jsonl", "one/*"]',
    "any depth": '"one/**"',
    "any depth, by name": '"**/[!a]*.jsonl"',
    "splits": '[{split: train, path: "two/*"}, {split: test, path: ["one/a.jsonl", "./one/b.jsonl", "nothing/*"]}]',
}


@pytest.mark.parametrize("form", DATA_FILES)
def test_data_files_of_a_readme_are_those_that_datasets_takes(tmp_path: Path, form: str) -> None:
    front = f"---\nlicense: mit\nconfigs:\n- config_name: x\n  data_files: {DATA_FILES[form]}\n---\n# Title\n"
    make(tmp_path, NAMES, front)
    expected = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    for split in expected:
        assert read(tmp_path, split=split) == expected[split].to_list()


def test_a_configuration_is_chosen_by_name_or_default(tmp_path: Path) -> None:
    front = """---
configs:
- config_name: a
  data_files: one/a.jsonl
- config_name: deep
  data_dir: one/deep
{0}---
"""
    make(tmp_path, NAMES, front.format(""))
    assert read(tmp_path, config="a") == oracle(tmp_path, "a")
    assert read(tmp_path, config="deep") == oracle(tmp_path, "deep")
    with pytest.raises(ValueError, match=r"no default among the configurations a, deep"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"no configuration b; it has a, deep"):
        read(tmp_path, config="b")
    for default in (
        "- config_name: default\n  data_files: two/d.jsonl\n",
        "- {config_name: c, data_files: two/d.jsonl, default: true}\n",
    ):
        make(tmp_path, [], front.format(default))
        assert read(tmp_path) == oracle(tmp_path)
        assert {row["file"] for row in read(tmp_path)} == {"two/d.jsonl"}


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("data_files: ../outside.jsonl", "inside the folder"),
        ("data_files: /etc/passwd.jsonl", "inside the folder"),
        ("data_dir: ../..", "inside the folder"),
        ("data_files: [{split: train, path: one/../../x.jsonl}]", "inside the folder"),
        ("data_files: nothing.jsonl", "no such data file"),
        ("data_files: {a: 1}", "data_files is neither"),
        ("data_files: [one/a.jsonl, 7]", "data_files is neither"),
        ("data_files: [{split: a, path: x}, {split: a, path: y}]", "twice"),
        ("data_files: 'one/[z-a].jsonl'", "is not a file name pattern"),
        ("data_files: '*/nothing.jsonl'", "no split train"),
        ("data_files: [", "not YAML"),
        ("x: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_broken_readme_is_one_error(tmp_path: Path, configs: str, message: str) -> None:
    make(tmp_path, NAMES, f"---\nconfigs:\n- config_name: x\n  {configs}\n---\n")
    with pytest.raises(ValueError, match=r"^data.sources\[0\]: .*" + re.escape(message)) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_configs_must_be_a_list(tmp_path: Path) -> None:
    for configs in ("configs: 3", "configs: [{data_files: x}]", "configs: [x]"):
        make(tmp_path, NAMES, f"---\n{configs}\n---\n")
        with pytest.raises(ValueError, match="`configs` is not a list"):
            read(tmp_path)


def test_yaml_is_needed_only_for_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    make(tmp_path, ["train.jsonl"], "---\nlicense: mit\n---\n")
    assert len(read(tmp_path)) == 2
    make(tmp_path, [], "---\nconfigs:\n- config_name: x\n---\n")
    with pytest.raises(ValueError, match=r"README.md: .*needs yaml"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../outside.arrow", "/outside.arrow", "a/../../outside.arrow", 7])
def test_a_saved_data_set_cannot_point_outside_its_folder(tmp_path: Path, name: Any) -> None:
    datasets.Dataset.from_list([{"n": 1}]).save_to_disk(str(tmp_path / "data"))
    state = json.loads((tmp_path / "data" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state.json: .*inside the folder"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", "{", "state.json: not JSON"),
        ("state.json", "[]", "state.json: not a JSON object"),
        ("state.json", '{"_data_files": []}', "`_data_files` is not a list of objects"),
        ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "no such file: .*gone.arrow"),
        ("state.json", '{"_data_files": [{"filename": "x"}], "_indices_files": [1]}', "saved with an index"),
        ("dataset_dict.json", '{"splits": "train"}', "`splits` is not a list of names"),
        ("dataset_dict.json", '{"splits": ["train"]}', "no state.json"),
        ("dataset_dict.json", '{"splits": ["../train"]}', "no split train"),
    ],
)
def test_an_incomplete_saved_data_set_is_one_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_loading_script_is_refused_and_not_run(tmp_path: Path) -> None:
    make(tmp_path, [], "")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"loading script"):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_split_in_two_file_types_is_refused(tmp_path: Path) -> None:
    make(tmp_path, ["train.jsonl", "train.parquet"])
    with pytest.raises(ValueError, match="two kinds"):
        read(tmp_path)


def test_a_git_lfs_pointer_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, ["train-00.csv", "train-01.csv"])
    (folder / "train-01.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for path in (folder, folder / "train-01.csv", folder / "*.csv"):
        with pytest.raises(ValueError, match=r"train-01.csv is a Git LFS pointer"):
            read(tmp_path, path=str(path))
    assert count_rows(folder / "train-01.csv", tmp_path / "u") is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DataSource(), r"data.sources\[0\].path: empty"),
        (DataSource(path="nothing/here.jsonl"), r"data.sources\[0\]: no such file or folder: nothing/here.jsonl"),
        (DataSource(path="{0}/a.tsv"), r"a.tsv: unsupported"),
        (DataSource(path="{0}/a.jsonl", split="test"), r"split = test: .*a.jsonl is not a folder"),
        (DataSource(path="{0}/a.jsonl", config="b"), r"config = b: .*a.jsonl is not a folder"),
        (DataSource(path="{0}/sub"), r"/sub: no data files"),
        (DataSource(path="{0}", config="b"), r"no configuration b; README.md"),
        (DataSource(path="{0}/*.csv"), r"the pattern .*/\*.csv matches no file"),
        (DataSource(path="{0}/s*"), r"the pattern .*/s\* matches folders only"),
        (DataSource(path="{0}/*.jsonl", split="test"), r"split = test: .* is not a folder"),
        (DataSource(path="{0}/a.jsonnl"), r"no such file .*did you mean a.jsonl\?"),
        (DataSource(path="org/some_data"), r"a local path is relative to .*; if it is a dataset"),
        (DataSource(path="tests/zzz-41"), r"hbp-titan download tests/zzz-41"),
        (DataSource(path="org/some.jsonl"), r"no such file or folder: org/some.jsonl$"),
        (DataSource(path="org/some_data"), r"hbp-titan download org/some_data --dataset .*data/some_data"),
        (DataSource(path="hf://datasets/org/d/x.parquet"), r"hbp-titan download org/d --dataset"),
        (DataSource(path="https://host/datasets/org/d"), r"hbp-titan download org/d --dataset"),
        (DataSource(path="s3://bucket/x.jsonl"), r"a URL is not read"),
    ],
)
def test_an_unusable_source_is_reported_with_its_key(tmp_path: Path, source: DataSource, message: str) -> None:
    folder = make(tmp_path, ["a.tsv", "a.jsonl", "sub/b.txt"])
    source.path = source.path.format(folder)
    with pytest.raises(ValueError, match=message):
        source_files(source, "data.sources[0]")


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"a": 1}\n\n{"a": 2}', b'\n{"a": 1}\r\n \r\n{"a": 2}\n\n'])
def test_rows_of_a_compressed_file_are_counted_without_a_copy(tmp_path: Path, content: bytes) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "b.json.gz"]
    for file in files:
        file.write_bytes(gzip.compress(content) if file.name.endswith("gz") else content)
    assert [count_rows(file, tmp_path / "u") for file in files] == [content.count(b"a")] * 3
    files[1].write_bytes(gzip.compress(content)[:-5])
    assert count_rows(files[1], tmp_path / "u") is None


def test_files_may_be_links_as_in_a_hub_cache(tmp_path: Path) -> None:
    folder = make(tmp_path, ["x"])
    (folder / "x").rename(tmp_path / "blob")
    (folder / "train.jsonl").symlink_to(tmp_path / "blob")
    assert read(tmp_path) == oracle(tmp_path) == [{"file": "x", "row": 0}, {"file": "x", "row": 1}]
