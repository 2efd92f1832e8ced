"""Any sharding is read at any other and by one process alone; a hostile folder is rejected and nothing in it runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from hbp_titan.components.checkpoint import PinnedStaging, load_model_tensors, load_tensors, save_model_tensors
from hbp_titan.components.dcp_storage import CorruptCheckpoint, FolderWriter, LocalDataPlanner
from hbp_titan.distributed.world import World
from hbp_titan.testing.local_ranks import run_distributed


def _whole() -> dict[str, Tensor]:
    """Return tensors whose sizes no world size divides, a scalar, an empty tensor, and several dtypes."""
    return {
        "rows": torch.arange(35.0).view(7, 5),
        "experts": torch.arange(6.0 * 5 * 3).view(6, 5, 3).bfloat16(),
        "columns": torch.arange(21).view(3, 7),
        "few_rows": torch.arange(4.0).view(2, 2),
        "copied": torch.arange(3).to(torch.uint8),
        "plain": torch.arange(5.0, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


def _sharded(world: World, fill: bool) -> dict[str, Tensor]:
    """Return `_whole` as this rank's shards, on one mesh axis and, for an even world size, on two."""
    flat = init_device_mesh("cpu", (world.size,))
    square = init_device_mesh("cpu", (2, world.size // 2)) if world.size % 2 == 0 else None
    placements: dict[str, tuple[Any, list[Placement]]] = {
        "rows": (flat, [Shard(0)]),
        "experts": (square, [Shard(1), Shard(0)]) if square else (flat, [Shard(0)]),
        "columns": (square, [Replicate(), Shard(1)]) if square else (flat, [Shard(1)]),
        "few_rows": (flat, [Shard(0)]),
        "copied": (flat, [Replicate()]),
        "empty": (flat, [Shard(0)]),
    }
    found: dict[str, Tensor] = {}
    for name, value in _whole().items():
        value = value if fill else torch.full_like(value, 77)
        found[name] = distribute_tensor(value, *placements[name]) if name in placements else value
    return found


def _save(world: World, folder: Path) -> None:
    tensors = _sharded(world, fill=True)
    local = PinnedStaging().copy(tensors)
    writer = FolderWriter(folder, world.rank, {})
    dcp.save(tensors, storage_writer=writer, planner=LocalDataPlanner(local), process_group=dist.new_group())


def _load(world: World, folder: Path, save_to: Path | None) -> dict[str, Tensor]:
    """Return the whole tensors of `folder`; this world size also saves its own checkpoint."""
    if save_to:
        _save(world, save_to)
    tensors = _sharded(world, fill=False)
    load_tensors(folder, tensors)
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint saved by four ranks."""
    folder = tmp_path_factory.mktemp("checkpoint") / "four"
    run_distributed(_save, 4, folder)
    return folder


def test_any_sharding_is_read_at_any_other(four: Path, tmp_path: Path) -> None:
    three = tmp_path / "three"
    for folder, world_size, save_to in ((four, 3, three), (three, 2, None)):
        for found in run_distributed(_load, world_size, folder, save_to):
            assert all(found[name].equal(value) for name, value in _whole().items())
    alone = {name: torch.full_like(value, 77) for name, value in _whole().items()}
    load_tensors(four, alone)
    assert all(alone[name].equal(value) for name, value in _whole().items())


def test_each_byte_is_written_once_and_the_ranks_share_the_work(four: Path) -> None:
    files = sorted(four.glob("*.safetensors"))
    assert [path.name for path in files] == [f"rank-{rank}.safetensors" for rank in range(4)]
    parts = [load_file(path) for path in files]
    assert sum(t.nbytes for part in parts for t in part.values()) == sum(t.nbytes for t in _whole().values())
    assert parts[1]["rows"].equal(torch.arange(10.0, 20.0).view(2, 5))


def _model() -> torch.nn.Module:
    with torch.device("meta"):
        return torch.nn.Linear(3, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.arange(2.0)}
    save_model_tensors(tmp_path / "saved", tensors, {"model": {}})
    return tmp_path / "saved"


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _seal(folder: Path) -> None:
    """Update the manifest: hostile folders have correct checksums."""
    path = folder / "manifest.json"
    files = json.loads(path.read_text())["files"]
    for name in files:
        data = (folder / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps({"files": files}))


@pytest.mark.parametrize("name", ["rank-0.safetensors", "tensors.json", "state.json", "manifest.json"])
def test_pickle_in_place_of_a_file_is_rejected_and_does_not_run(folder: Path, name: str) -> None:
    mark = folder / "exploded"
    (folder / name).write_bytes(pickle.dumps(_Bomb(mark)))
    # Where torch's own format keeps its metadata.
    (folder / ".metadata").write_bytes(pickle.dumps(_Bomb(mark)))
    if name != "manifest.json":
        _seal(folder)
    with pytest.raises(CorruptCheckpoint, match=rf"{name}: not (JSON|a complete safetensors)"):
        load_model_tensors(folder, _model())
    assert not mark.exists()


def _edit(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    if name == "tensors.json":
        _seal(folder)


def _chunk(*values: Any) -> Callable[[Path], None]:
    return lambda folder: _edit(
        folder, "tensors.json", lambda index: index["model.weight"].update(chunks=[list(values)])
    )


def _bias(value: Any) -> Callable[[Path], None]:
    return lambda folder: _edit(folder, "tensors.json", lambda index: index.update({"model.bias": value}))


def _listed(name: str) -> Callable[[Path], None]:
    return lambda folder: _edit(
        folder, "manifest.json", lambda values: values["files"].update({name: values["files"]["rank-0.safetensors"]})
    )


def _link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "rank-0.safetensors").rename(outside)
    (folder / "rank-0.safetensors").symlink_to(outside)


def _link_inside(folder: Path) -> None:
    (folder / "tensors.json").rename(folder / "t.json")
    (folder / "tensors.json").symlink_to("t.json")


def _pipe(folder: Path) -> None:
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def _other_tensor(value: Tensor) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "rank-0.safetensors")
        save_file({**tensors, "model.weight": value}, folder / "rank-0.safetensors")
        _seal(folder)

    return apply


def _nested(folder: Path) -> None:
    (folder / "tensors.json").write_text("[" * 100_000)
    _seal(folder)


HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (_chunk("../outside.safetensors", [0, 0], [2, 3]), "tensors.json: .* not the name"),
    (_chunk("/etc/passwd", [0, 0], [2, 3]), "tensors.json: .* not the name"),
    (_chunk("..", [0, 0], [2, 3]), "tensors.json: .* not the name"),
    (_chunk("a\nb", [0, 0], [2, 3]), "tensors.json: .* not the name"),
    (_chunk("other.safetensors", [0, 0], [2, 3]), "does not list"),
    (_listed("../outside.safetensors"), "manifest.json: .* not the name"),
    (_listed("/etc/passwd"), "manifest.json: .* not the name"),
    (_link_outside, "rank-0.safetensors: not a regular file"),
    (_link_inside, "tensors.json: not a regular file"),
    (_pipe, "state.json: not a regular file"),
    (_chunk("rank-0.safetensors", [1, 0], [2, 3]), "'model.weight' lies outside"),
    (_chunk("rank-0.safetensors", [0, 0], [1, 3]), "'model.weight' do not fill"),
    (_chunk("rank-0.safetensors", [-1, 0], [2, 3]), "'model.weight' does not describe"),
    (_chunk("rank-0.safetensors", [0.0, 0], [2, 3]), "'model.weight' does not describe"),
    (_chunk("rank-0.safetensors"), "'model.weight' does not describe"),
    (_bias({"dtype": "object", "shape": [2], "chunks": []}), "'model.bias' does not describe"),
    (_bias(1), "'model.bias' does not describe"),
    (_nested, "tensors.json: not JSON"),
    (_other_tensor(torch.zeros(3, 2)), r"F32 \[3, 2\] .* F32 \[2, 3\]"),
    (_other_tensor(torch.zeros(2, 3).int()), "I32 .* F32"),
]


@pytest.mark.parametrize(("change", "words"), HOSTILE)
def test_hostile_folder_is_rejected_on_one_line(folder: Path, change: Callable[[Path], None], words: str) -> None:
    change(folder)
    with pytest.raises(CorruptCheckpoint, match=words) as caught:
        load_model_tensors(folder, _model())
    assert "\n" not in str(caught.value)
