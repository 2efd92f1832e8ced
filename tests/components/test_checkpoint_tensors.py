"""Any sharding is read back at any other, and by one process alone; nothing that a hostile folder holds is run."""

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
    """Sizes that no world size divides, a scalar, an empty tensor and several dtypes."""
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
    """The tensors of `_whole` as rank's shards: on one axis, and with an even world size on two."""
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


def _load(world: World, folder: Path, again: Path | None) -> dict[str, Tensor]:
    """Whole tensors of `folder`, also saved once more by this world size."""
    if again:
        _save(world, again)
    tensors = _sharded(world, fill=False)
    load_tensors(folder, tensors)
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks saved."""
    folder = tmp_path_factory.mktemp("checkpoint") / "four"
    run_distributed(_save, 4, folder)
    return folder


def test_any_sharding_is_read_at_any_other(four: Path, tmp_path: Path) -> None:
    three = tmp_path / "three"
    for folder, world_size, again in ((four, 3, three), (three, 2, None)):
        for found in run_distributed(_load, world_size, folder, again):
            assert all(found[name].equal(value) for name, value in _whole().items())
    alone = {name: torch.full_like(value, 77) for name, value in _whole().items()}
    load_tensors(four, alone)
    assert all(alone[name].equal(value) for name, value in _whole().items())


def test_ranks_share_the_writing_and_no_byte_is_written_twice(four: Path) -> None:
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
    """A manifest that fits what is there: hostile folders have right checksums."""
    path = folder / "manifest.json"
    files = json.loads(path.read_text())["files"]
    for name in files:
        data = (folder / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps({"files": files}))


def test_whole_tensors_come_back_without_a_process_group(folder: Path) -> None:
    found = load_model_tensors(folder, _model())
    assert found["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["bias"].tolist() == [0, 1]
    assert load_file(folder / "rank-0.safetensors").keys() == {"model.weight", "model.bias"}


PICKLED = {
    "rank-0.safetensors": "rank-0.safetensors: not a whole safetensors file",
    "tensors.json": "tensors.json: not JSON",
    "state.json": "state.json: not JSON",
    "manifest.json": "manifest.json: not JSON",
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickle_in_place_of_a_file_is_refused_and_not_run(folder: Path, name: str) -> None:
    mark = folder / "exploded"
    (folder / name).write_bytes(pickle.dumps(_Bomb(mark)))
    # What torch's own format keeps its metadata in.
    (folder / ".metadata").write_bytes(pickle.dumps(_Bomb(mark)))
    if name != "manifest.json":
        _seal(folder)
    with pytest.raises(CorruptCheckpoint, match=PICKLED[name]) as caught:
        load_model_tensors(folder, _model())
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def _index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "tensors.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))
        _seal(folder)

    return apply


def _chunk(*values: Any) -> Callable[[Path], None]:
    def change(index: dict[str, Any]) -> None:
        index["model.weight"]["chunks"] = [list(values)]

    return _index(change)


def _listed(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        values["files"][name] = values["files"]["rank-0.safetensors"]
        path.write_text(json.dumps(values))

    return apply


def _link(folder: Path) -> None:
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


NOT_HERE = "is not the name of a file in this folder"
HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (_chunk("../outside.safetensors", [0, 0], [2, 3]), f"tensors.json: '../outside.safetensors' {NOT_HERE}"),
    (_chunk("/etc/passwd", [0, 0], [2, 3]), f"tensors.json: '/etc/passwd' {NOT_HERE}"),
    (_chunk("..", [0, 0], [2, 3]), f"tensors.json: '..' {NOT_HERE}"),
    (_chunk("a\nb", [0, 0], [2, 3]), f"tensors.json: 'a\\\\nb' {NOT_HERE}"),
    (_chunk("other.safetensors", [0, 0], [2, 3]), "'model.weight' lies in other.safetensors, which manifest.json does"),
    (_listed("../outside.safetensors"), f"manifest.json: '../outside.safetensors' {NOT_HERE}"),
    (_listed("/etc/passwd"), f"manifest.json: '/etc/passwd' {NOT_HERE}"),
    (_link, "rank-0.safetensors: not a regular file; links and devices are not followed"),
    (_link_inside, "tensors.json: not a regular file"),
    (_pipe, "state.json: not a regular file"),
    (_chunk("rank-0.safetensors", [1, 0], [2, 3]), "a chunk of 'model.weight' lies outside the tensor's shape"),
    (_chunk("rank-0.safetensors", [0, 0], [1, 3]), "the chunks of 'model.weight' do not fill its shape"),
    (_chunk("rank-0.safetensors", [-1, 0], [2, 3]), "'model.weight' is not described as a tensor"),
    (_chunk("rank-0.safetensors", [0.0, 0], [2, 3]), "'model.weight' is not described as a tensor"),
    (_chunk("rank-0.safetensors"), "'model.weight' is not described as a tensor"),
    (_index(lambda index: index["model.bias"].update(dtype="object")), "'model.bias' is not described as a tensor"),
    (_index(lambda index: index.update({"model.bias": 1})), "'model.bias' is not described as a tensor"),
    (_nested, "tensors.json: not JSON"),
    (_other_tensor(torch.zeros(3, 2)), r"model.weight is F32 \[3, 2\] in its file, tensors.json says F32 \[2, 3\]"),
    (_other_tensor(torch.zeros(2, 3).int()), "model.weight is I32 .* in its file, tensors.json says F32"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_hostile_folder_is_refused_in_one_line(folder: Path, change: Callable[[Path], None], message: str) -> None:
    change(folder)
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        load_model_tensors(folder, _model())
    assert "\n" not in str(caught.value)
