"""Download of models and data sets of the Hugging Face hub into folders that model.hf_path and data.sources read.

Owns the choice of the files that training needs, the local folder, and the check of what arrived. Each file is written
to a hidden folder, where a later call continues it by a range request, and moved to its place when its hash is the one
that the hub lists: SHA-256 for large files, git's SHA-1 for others. Pickles are never downloaded. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from hbp_titan.data.disk import free_bytes, is_full
from hbp_titan.data.files import SUFFIXES
from hbp_titan.errors import format_error
from hbp_titan.hub import Hub, HubFile, Repository
from hbp_titan.models.hf_files import (
    LICENSE,
    MODEL_CODE,
    download_folder,
    indexed_files,
    is_tokenizer_file,
    read_json,
)
from hbp_titan.utils import atomic_write, first_n, human_bytes, sha256_text

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_SETTINGS = ("config.json", "generation_config.json", "README.md")
# What data/repository.py reads to find the files of a split.
_LISTINGS = ("README.md", "dataset_dict.json", "state.json")
_STATE_FOLDER = ".hbp_download"
_LARGE = 2**26
"""Bytes from which a finished file gets a line."""


@dataclass
class Request:
    """What to download, as the options of scripts/download.py."""

    repo_id: str
    repo_type: str = "model"
    revision: str = "main"
    out: Path | None = None
    include: Sequence[str] = ()
    split: str = ""
    config: str = ""
    token: str | None = None
    connections: int = 8
    overwrite: bool = False


def download(request: Request) -> Path:
    """Download what training needs of a repository; return the folder. Prints sizes, and the lines for the TOML file.

    A finished folder is left as it is. Raises ValueError for a repository, revision, pattern or split that does not
    exist, without access, for a full disk, and for local files that differ from the hub's unless `overwrite`.
    """
    folder = request.out or Path(download_folder(request.repo_id, request.repo_type))
    hub = Hub(request.token)
    repository = hub.list_files(request.repo_id, request.repo_type, request.revision)
    print(f"{request.repo_id}: {request.revision} is commit {repository.commit}", flush=True)
    local = LocalFolder(folder, repository, request.overwrite)
    transfer = Transfer(hub, repository, local, request.connections)
    try:
        chosen = _choose_files(repository, request, local, transfer)
        transfer.fetch(chosen, show=True)
        local.remove_leftovers()
    finally:
        local.close()
    _print_settings(folder, request)
    return folder


# Choice of files


def _choose_files(repository: Repository, request: Request, local: LocalFolder, transfer: Transfer) -> list[HubFile]:
    """Return the files to download, and print those that are not.

    Downloads what the choice depends on: the index of a model's weights, the listings of a data set's splits.
    """
    names = list(repository.files)
    if request.repo_type == "dataset":
        chosen = _data_names(repository, request, local, transfer)
    else:
        chosen = _model_names(repository, request, local, transfer)
    if request.include:
        chosen = _included(names, chosen, request)
    picked = set(chosen)
    if rest := [name for name in names if name not in picked and name != ".gitattributes"]:
        size = sum(repository.files[name].size for name in rest)
        kinds = "pickles or not needed" if any(map(_is_pickle, rest)) else "not needed"
        print(f"not downloaded, {kinds}: {first_n(rest, 8)} ({human_bytes(size)})")
    return [repository.files[name] for name in names if name in picked]


def _model_names(repository: Repository, request: Request, local: LocalFolder, transfer: Transfer) -> list[str]:
    files = repository.files
    # Subfolders hold other formats (original/, onnx/), but a tokenizer's additional templates.
    chosen = [name for name in files if _is_small_model_file(name)]
    if WEIGHTS in files:
        return [*chosen, WEIGHTS]
    if INDEX not in files:
        if not request.include:
            raise ValueError(f"{request.repo_id}: {_no_weights(list(files))}")
        return chosen
    if request.include and not any(fnmatchcase(name, p) for name in filter(_is_weight, files) for p in request.include):
        return chosen
    transfer.fetch([files[INDEX]])
    shards = indexed_files(local.folder / INDEX)
    if missing := [name for name in shards if name not in files]:
        raise ValueError(f"{request.repo_id}: {INDEX} lists {first_n(missing, 3)}, which the repository does not have")
    return [*chosen, INDEX, *shards]


def _is_small_model_file(name: str) -> bool:
    if _is_pickle(name) or _is_weight(name):
        return False
    code = any(fnmatchcase(name, pattern) for pattern in MODEL_CODE)
    legal = "/" not in name and LICENSE.fullmatch(name) is not None
    return name in _SETTINGS or is_tokenizer_file(name) or legal or code


def _is_pickle(name: str) -> bool:
    return name.lower().endswith(_PICKLES)


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors")


def _no_weights(names: Sequence[str]) -> str:
    """Return why a model repository has no weights that are read, and what to do."""
    if pickles := [name for name in names if _is_pickle(name)]:
        return (
            f"has pickles ({first_n(pickles, 2)}) and no safetensors, and pickles are never downloaded; choose a "
            "revision with safetensors (--revision refs/pr/N, the hub's conversion of many repositories), or "
            "--include 'tokenizer*' for the tokenizer alone"
        )
    return (
        f"has neither {WEIGHTS} nor {INDEX}; it has {first_n(names, 5)}; is it a data set (--dataset)? "
        "--include PATTERN downloads single files"
    )


def _data_names(repository: Repository, request: Request, local: LocalFolder, transfer: Transfer) -> list[str]:
    files = repository.files
    legal = [name for name in files if name == "README.md" or ("/" not in name and LICENSE.fullmatch(name))]
    data = [name for name in files if name.lower().endswith(SUFFIXES)]
    if not data:
        scripts = [name for name in files if name.endswith(".py")]
        why = f"only a loading script ({scripts[0]}), which is never run" if scripts else f"{first_n(list(files), 5)}"
        raise ValueError(
            f"{request.repo_id}: no data files ({', '.join(SUFFIXES)}); it has {why}; the hub converts many data sets "
            "itself: --revision refs/convert/parquet"
        )
    if request.split or request.config:
        listings = [files[name] for name in files if PurePosixPath(name).name in _LISTINGS]
        transfer.fetch(listings)
        data = _names_of_split(list(files), request, local.folder)
        data += [file.name for file in listings if file.name not in data]
    return list(dict.fromkeys([*legal, *data]))


def _names_of_split(names: Sequence[str], request: Request, folder: Path) -> list[str]:
    """Return the files of a split by the rules by which they are read later.

    These look at a folder, so it is built of empty files, with the repository's listings.
    """
    from hbp_titan.data.repository import folder_files
    from hbp_titan.job_config import DataSource

    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / request.repo_id.rpartition("/")[2]
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            is_listing = PurePosixPath(name).name in _LISTINGS
            (copy / name).write_bytes((folder / name).read_bytes() if is_listing else b"")
        source = DataSource(path=str(copy), split=request.split or "train", config=request.config)
        try:
            found = folder_files(copy, source, request.repo_id)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), request.repo_id)) from None
        return [file.relative_to(copy).as_posix() for file in found.files]


def _included(names: Sequence[str], chosen: Sequence[str], request: Request) -> list[str]:
    """Return the chosen names that match a pattern of --include; raises ValueError if a pattern selects nothing."""
    for pattern in request.include:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"--include {pattern}: no such file; the repository has {first_n(names, 10)}")
        if not set(matching) & set(chosen):
            reason = "pickles are never downloaded" if _is_pickle(matching[0]) else "training does not read it"
            raise ValueError(f"--include {pattern}: {first_n(matching, 3)}: {reason}")
    return [name for name in chosen if any(fnmatchcase(name, pattern) for pattern in request.include)]


def _print_settings(folder: Path, request: Request) -> None:
    """Print the lines of the configuration that use the folder."""
    print("in the configuration:\n")
    if request.repo_type == "model":
        print(f"[model]\nhf_path = {json.dumps(str(folder))}")
        return
    print(f"[[data.sources]]\npath = {json.dumps(str(folder))}")
    options = {"config": request.config, "split": request.split if request.split != "train" else ""}
    for key, value in options.items():
        if value:
            print(f"{key} = {json.dumps(value)}")
    from hbp_titan.data.repository import folder_files
    from hbp_titan.job_config import DataSource

    try:
        source = DataSource(path=str(folder), split=request.split or "train", config=request.config)
        folder_files(folder, source, "data.sources[0]")
    except ValueError as error:
        print(f"\nnote: {format_error(error)}")


# Local folder


class LocalFolder:
    """The folder of a repository, and the record of what was downloaded to it before.

    Owns the hidden folder in it: one JSON file with size, time and hash of each verified file, and partial files by
    hash. Methods may be called from several threads for different files.
    """

    def __init__(self, folder: Path, repository: Repository, overwrite: bool) -> None:
        self.folder, self.repository, self.overwrite = folder, repository, overwrite
        self._record = folder / _STATE_FOLDER / "files.json"
        self._lock: IO[str] | None = None
        self._verified: dict[str, dict[str, Any]] = {}
        if self._record.is_file():
            state = read_json(self._record)
            repo_type, repo_id = state.get("repo_type"), state.get("repo_id")
            if (repo_type, repo_id) != (repository.repo_type, repository.repo_id):
                raise ValueError(f"{folder}: has files of the {repo_type} {repo_id}; set --out to another folder")
            self._verified = state.get("files", {})

    def partial(self, file: HubFile) -> Path:
        """Return the path of a file's part that has arrived."""
        # With the name, because several files may have the same content.
        return self._record.parent / f"{file.oid}.{sha256_text(file.name)[:8]}.part"

    def lock(self) -> None:
        """Keep other processes from downloading to the folder until `close`."""
        if self._lock is not None:
            return
        self._record.parent.mkdir(parents=True, exist_ok=True)
        self._lock = (self._record.parent / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another process downloads to it; wait for its end") from None
        except OSError as error:
            # A file system without locks; the hashes still find what two processes wrote into one file.
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise

    def is_current(self, file: HubFile) -> bool:
        """Return whether the folder has this version of the file; raises ValueError if it has one of another origin."""
        path = self.folder / file.name
        if not path.is_file():
            return False
        recorded = self._verified.get(file.name, {})
        unchanged = _stamp(path) == recorded.get("stamp")
        if unchanged and recorded["oid"] == file.oid:
            return True
        if path.stat().st_size == file.size:
            if file.size >= _LARGE:
                print(f"{path}: comparing with the hub's hash", flush=True)
            if _content_id(path, file.oid) == file.oid:
                self.note_verified(file)
                return True
        # An older version that this command downloaded is replaced; what someone else wrote is not.
        if not unchanged and not self.overwrite:
            raise ValueError(f"{path}: differs from the hub's; remove it, or replace it by --overwrite")
        return False

    def accept(self, file: HubFile) -> None:
        """Check the hash of a finished part and move it to its place. Raises ValueError if it differs."""
        part = self.partial(file)
        if _content_id(part, file.oid) != file.oid:
            part.unlink()
            raise ValueError(f"{file.name}: what arrived does not have the hub's hash; run the same command again")
        target = self.folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)
        self.note_verified(file)

    def remove_leftovers(self) -> None:
        """Delete parts, and files of earlier calls that this revision does not have: a data source would read them.

        Of files that were changed since, only their names are printed.
        """
        # Without the lock, they may be another process's.
        for part in self._record.parent.glob("*.part") if self._lock else ():
            part.unlink()
        for name in [name for name in self._verified if name not in self.repository.files]:
            path = self.folder / name
            if path.is_file() and _stamp(path) == self._verified[name]["stamp"]:
                path.unlink()
                print(f"removed {path}: not in this revision")
            elif path.is_file():
                print(f"note: {path} is not in this revision, but was changed here; it stays")
            del self._verified[name]

    def note_verified(self, file: HubFile) -> None:
        """Record that the file has the hub's content."""
        self._verified[file.name] = {"oid": file.oid, "stamp": _stamp(self.folder / file.name)}

    def close(self) -> None:
        """Write the record, without which a later call reads each file to compare its hash; release the lock."""
        if self._verified:
            kind = {"repo_id": self.repository.repo_id, "repo_type": self.repository.repo_type}
            self._record.parent.mkdir(parents=True, exist_ok=True)
            state = {**kind, "commit": self.repository.commit, "files": self._verified}
            atomic_write(self._record, json.dumps(state, indent=1, sort_keys=True))
        if self._lock is not None:
            self._lock.close()


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _content_id(path: Path, like: str) -> str:
    """Return the hash of a file in the form of `like`: SHA-256, or git's SHA-1 of a blob."""
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Transfer


class _Stopped(Exception):
    """Another file failed."""


@dataclass
class Transfer:
    """Downloads files of a repository on several connections; a failure of one stops the others."""

    hub: Hub
    repository: Repository
    local: LocalFolder
    connections: int
    _stop: threading.Event = field(default_factory=threading.Event)

    def fetch(self, files: Sequence[HubFile], show: bool = False) -> None:
        """Download those of `files` that the folder does not have. show: print sizes and progress."""
        missing = [file for file in files if not self.local.is_current(file)]
        arrived = sum(min(_size(self.local.partial(file)), file.size) for file in missing)
        total = sum(file.size for file in missing)
        if show:
            _print_sizes(files, missing, arrived, self.local.folder)
        free = free_bytes(self.local.folder)
        if total - arrived > free:
            raise ValueError(
                f"{self.local.folder}: the download takes {human_bytes(total - arrived)}, but {human_bytes(free)} are "
                "free; free some space, or choose a folder on another disk by --out"
            )
        if not missing:
            return
        self.local.lock()
        with tqdm(total=total, initial=arrived, unit="B", unit_scale=True, disable=None if show else True) as bar:
            self._run(missing, bar)

    def _run(self, files: Sequence[HubFile], bar: tqdm) -> None:
        with ThreadPoolExecutor(self.connections) as pool:
            jobs = [pool.submit(self._fetch_one, file, bar) for file in files]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                # Also after Ctrl-C: the pool waits for its threads, which end at their next block.
                if not all(job.done() and job.exception() is None for job in jobs):
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
        failures = [error for job in jobs if not job.cancelled() and (error := job.exception())]
        for error in sorted(failures, key=lambda error: isinstance(error, _Stopped)):
            raise error

    def _fetch_one(self, file: HubFile, bar: tqdm) -> None:
        part = self.local.partial(file)
        try:
            self.hub.get(self.repository, file, part, partial(self._report, bar))
            self.local.accept(file)
        except OSError as error:
            if not is_full(error):
                raise
            raise ValueError(
                f"{part}: the disk is full; free some space and run the same command again, which continues"
            ) from error
        if file.size >= _LARGE:
            bar.write(f"{file.name}: {human_bytes(file.size)}, hash verified")

    def _report(self, bar: tqdm, count: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        bar.update(count)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _print_sizes(files: Sequence[HubFile], missing: Sequence[HubFile], arrived: int, folder: Path) -> None:
    """Print what is downloaded and how large it is, the largest files first."""
    have = f", {len(files) - len(missing)} are there" if len(missing) < len(files) else ""
    part = f", {human_bytes(arrived)} of the rest have arrived" if arrived else ""
    print(f"{len(files):,} files, {human_bytes(sum(file.size for file in files))}, to {folder}{have}{part}")
    shown = sorted(missing, key=lambda file: -file.size)
    for file in shown[:20]:
        print(f"  {human_bytes(file.size):>10}  {file.name}")
    if rest := shown[20:]:
        print(f"  {human_bytes(sum(file.size for file in rest)):>10}  in {len(rest):,} more")
    if not missing:
        print("complete, nothing to download", flush=True)
