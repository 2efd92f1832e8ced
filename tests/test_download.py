"""scripts/download.py against a hub on the loopback device: choice of files, resuming, hashes, access, errors."""

from __future__ import annotations

import fcntl
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hbp_titan.data.files import source_files
from hbp_titan.job_config import DataSource
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.hf_export import save_hf_folder
from hbp_titan.models.registry import get_flavor
from scripts.download import main
from tests.local_hub import TOKEN, LocalHub

MISSING = (
    "needs huggingface_hub; run: .venv/bin/pip install huggingface_hub && scripts/run_tests.sh tests/test_download.py"
)
huggingface_hub = pytest.importorskip("huggingface_hub", reason=MISSING)
constants = pytest.importorskip("huggingface_hub.constants", reason=MISSING)

BYTES = bytes(range(256))
SHARDS = {
    "model.safetensors.index.json": b"""
        {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}""",
    "model-1-of-2.safetensors": 8 * BYTES,
    "model-2-of-2.safetensors": 64 * BYTES,
}
MODEL = {"config.json": b"{}", "tokenizer.json": b"{ }", **SHARDS}
OTHERS = {
    ".gitattributes": b"*",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same",
    "original/params.json": b"{}",
    "tokenizer/merges.txt": b"of a pipeline",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Serve a hub that HF_ENDPOINT names, in an empty working directory and without a token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Small blocks, so that a part of a small file is kept; no pauses between attempts.
    monkeypatch.setattr("hbp_titan.hub._BLOCK_BYTES", 1024)
    monkeypatch.setattr("hbp_titan.hub._FIRST_PAUSE_SECONDS", 0.0)
    with LocalHub().serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served
    huggingface_hub.close_session()


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the visible files by relative name."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {name.as_posix(): (folder / name).read_bytes() for name in names if not name.parts[0].startswith(".")}


def test_a_downloaded_model_is_read_and_a_second_call_transfers_nothing(
    hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = get_flavor("debug")
    tensors = Decoder(args).state_dict().items()
    save_hf_folder(args, tensors, tmp_path / "source", dtype=torch.float32, max_shard_bytes=2e6)
    files = files_in(tmp_path / "source") | {
        "tokenizer.json": b"{}", "additional_chat_templates/tools.jinja": b"{{ x }}", "LICENSE.txt": b"Apache",
        "README.md": b"#", "modeling_own.py": b"raise SystemExit",
    }  # fmt: skip
    hub.add("org/tiny", {**files, **OTHERS})
    main(["org/tiny"])
    assert files_in(Path("models/tiny")) == files
    assert len(HFTensors("models/tiny")) > 0
    printed = capsys.readouterr().out
    assert '[model]\nhf_path = "models/tiny"' in printed
    assert "pytorch_model.bin" in printed
    transferred = len(hub.transfers)
    assert transferred == len(files)
    main(["org/tiny"])
    assert len(hub.transfers) == transferred
    assert "complete, nothing to download" in capsys.readouterr().out


@pytest.mark.parametrize(("ranges", "expected"), [(True, [0, 4096, 8192]), (False, [0, 0, 0])])
def test_a_broken_connection_is_continued_where_it_broke(hub: LocalHub, ranges: bool, expected: list[int]) -> None:
    hub.add("org/m", MODEL)
    hub.ranges = ranges
    hub.cuts["model-2-of-2.safetensors"] = [5000, 9000]
    main(["org/m", "--out", "m"])
    assert files_in(Path("m")) == MODEL
    # Whole blocks of 1024 bytes were kept each time.
    starts = [start for name, start, _ in hub.transfers if name == "model-2-of-2.safetensors"]
    assert starts == expected


def test_a_later_call_continues_a_part_and_fetches_only_what_is_missing(hub: LocalHub) -> None:
    hub.add("org/m", MODEL)
    hub.cuts["model-2-of-2.safetensors"] = [5000]
    hub.down_after_cut = True
    with pytest.raises(ValueError, match="503"):
        main(["org/m", "--out", "m", "--connections", "1"])
    assert files_in(Path("m")) == {name: MODEL[name] for name in MODEL if name != "model-2-of-2.safetensors"}
    hub.down_after_cut = False
    hub.transfers.clear()
    main(["org/m", "--out", "m"])
    assert [(name, start) for name, start, _ in hub.transfers] == [("model-2-of-2.safetensors", 4096)]
    assert files_in(Path("m")) == MODEL


def test_content_with_another_hash_is_not_kept(hub: LocalHub) -> None:
    hub.add("org/m", MODEL)
    hub.sent["model-1-of-2.safetensors"] = 8 * BYTES[::-1]
    with pytest.raises(ValueError, match="hash"):
        main(["org/m", "--out", "m"])
    assert "model-1-of-2.safetensors" not in files_in(Path("m"))
    hub.sent.clear()
    main(["org/m", "--out", "m"])
    assert files_in(Path("m")) == MODEL


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("sent", [b"", BYTES[:1000]])
def test_a_hub_that_ends_a_file_early_is_reported(hub: LocalHub, sent: bytes, ranges: bool) -> None:
    hub.add("org/m", MODEL)
    hub.ranges = ranges
    hub.sent["model-1-of-2.safetensors"] = sent
    with pytest.raises(ValueError, match="ends the file"):
        main(["org/m", "--out", "m"])


def test_files_of_others_are_adopted_if_equal_and_never_replaced_unasked(hub: LocalHub) -> None:
    repo = hub.add("org/m", MODEL)
    repo.revisions["v2"] = {**MODEL, "config.json": b'{"v": 2}'}
    Path("m").mkdir()
    Path("m/model-2-of-2.safetensors").write_bytes(SHARDS["model-2-of-2.safetensors"])
    main(["org/m", "--out", "m"])
    assert "model-2-of-2.safetensors" not in {name for name, *_ in hub.transfers}
    # Of another revision: replaced, because nobody changed what the first call wrote.
    main(["org/m", "--out", "m", "--revision", "v2"])
    assert Path("m/config.json").read_bytes() == b'{"v": 2}'
    Path("m/config.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="--overwrite"):
        main(["org/m", "--out", "m"])
    assert Path("m/config.json").read_text() == '{"mine": 1}'
    main(["org/m", "--out", "m", "--overwrite"])
    assert files_in(Path("m")) == MODEL


def test_files_that_a_newer_revision_lacks_do_not_stay_among_the_data(
    hub: LocalHub, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.add("org/d", {"a.jsonl": b"a", "b.jsonl": b"b", "c.jsonl": b"c"}, "dataset")
    repo.revisions["v2"] = {"a.jsonl": b"new"}
    main(["org/d", "--dataset", "--out", "d"])
    Path("d/c.jsonl").write_text("mine")
    main(["org/d", "--dataset", "--out", "d", "--revision", "v2"])
    assert files_in(Path("d")) == {"a.jsonl": b"new", "c.jsonl": b"mine"}
    printed = capsys.readouterr().out
    assert "removed d/b.jsonl" in printed
    assert "note: d/c.jsonl" in printed


def test_a_token_opens_a_restricted_repository_and_stays_on_the_hub(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/m", MODEL, gated=True)
    with pytest.raises(ValueError, match="HF_TOKEN"):
        main(["org/m"])
    with pytest.raises(ValueError, match="the token has no access"):
        main(["org/m", "--token", "hf_other"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    main(["org/m"])
    seen = {name: authorization for name, _, authorization in hub.transfers}
    assert seen["config.json"] == f"Bearer {TOKEN}"
    # On the host of large files.
    assert seen["model-1-of-2.safetensors"] is None


DATA = {
    "README.md": b"---\nconfigs:\n- config_name: en\n  data_files:\n  - {split: train, path: en/a-*.parquet}\n"
    b"  - {split: test, path: en/test.parquet}\n- config_name: de\n  data_files: de/*.parquet\n---\n",
    "en/a-0.parquet": BYTES,
    "en/a-1.parquet": 2 * BYTES,
    "en/test.parquet": b"t",
    "de/a.parquet": b"d",
    "load.py": b"",
    "rows.pkl": b"pickle",
}
TRAIN = {"en/a-0.parquet", "en/a-1.parquet"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], {*TRAIN, "en/test.parquet", "de/a.parquet", "README.md"}),
        (["--config", "en"], {*TRAIN, "README.md"}),
        (["--config", "en", "--split", "test"], {"en/test.parquet", "README.md"}),
        (["--include", "en/*-1.parquet", "--include", "README.md"], {"en/a-1.parquet", "README.md"}),
    ],
)
def test_a_data_set_is_downloaded_whole_by_split_or_by_pattern(
    hub: LocalHub, options: list[str], names: set[str]
) -> None:
    hub.add("org/rows", DATA, "dataset")
    main(["org/rows", "--dataset", *options])
    assert set(files_in(Path("data/rows"))) == names


def test_a_data_source_reads_what_was_downloaded(hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("org/rows", DATA, "dataset")
    main(["org/rows", "--dataset", "--config", "en", "--split", "train"])
    lines = capsys.readouterr().out.partition("[[data.sources]]\n")[2].splitlines()
    assert lines == ['path = "data/rows"', 'config = "en"']
    found = source_files(DataSource(path="data/rows", config="en"), "data.sources[0]")
    assert {file.relative_to("data/rows").as_posix() for file in found.files} == TRAIN
    assert found.unread == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["org/nothing"], "org/nothing: no such model .*HF_TOKEN"),
        (["org/rows"], "org/rows is a dataset; add --dataset"),
        (["org/m", "--dataset"], "remove --dataset"),
        (["m/o/d"], "OWNER/NAME"),
        (["org/m", "--revision", "mian"], r"no revision mian; it has main; did you mean main\?"),
        (["org/m", "--include", "*.gguf"], r"--include \*.gguf: no such file"),
        (["org/m", "--include", "*.bin"], "pickles are never downloaded"),
        (["org/pickles"], "--revision"),
        (["org/incomplete"], "lists model-2-of-2.safetensors"),
        (["org/escapes"], "not a path inside"),
        (["org/rows", "--dataset", "--config", "en", "--split", "dev"], r"no split dev; it has train \(en/a-0"),
        (["org/script", "--dataset"], "load.py.* refs/convert/parquet"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_transferred(hub: LocalHub, argv: list[str], message: str) -> None:
    hub.add("org/m", {**MODEL, **OTHERS})
    hub.add("org/pickles", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    hub.add("org/incomplete", {name: MODEL[name] for name in MODEL if name != "model-2-of-2.safetensors"})
    hub.add("org/escapes", {"config.json": b"{}", "../model.safetensors": b""})
    hub.add("org/rows", DATA, "dataset")
    hub.add("org/script", {"load.py": b"", "README.md": b""}, "dataset")
    with pytest.raises(ValueError, match=message):
        main(argv)
    # But the files that decide about others.
    assert {name for name, *_ in hub.transfers} <= {"model.safetensors.index.json", "README.md"}


def test_a_folder_that_cannot_take_the_download_is_reported(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/m", MODEL)
    hub.add("other/m", MODEL)
    main(["org/m", "--include", "config.json"])
    with pytest.raises(ValueError, match="--out"):
        main(["other/m"])
    with Path("models/m/.hbp_download/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            main(["org/m"])
    used = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=1000))
    with pytest.raises(ValueError, match="free some space"):
        main(["org/m"])


def test_a_hub_that_is_away_or_forbidden_is_reported(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalHub().serve() as ended:
        pass
    monkeypatch.setenv("HF_ENDPOINT", ended.url)
    with pytest.raises(ValueError, match="HF_ENDPOINT"):
        main(["org/m"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        main(["org/m"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hbp-titan\[hub\]"):
        main(["org/m"])
