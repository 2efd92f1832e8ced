"""The Hugging Face hub: lists the files of a repository and transfers them, with errors that say what to do.

Owns the use of huggingface_hub (extra `hub`): its listings, sessions, tokens and errors. Its downloads are not used,
because they start a file again after their process ended, and check sizes only. Imports no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from hbp_titan.errors import format_error
from hbp_titan.utils import did_you_mean, first_n

_ATTEMPTS = 6
"""Connections in sequence on which nothing arrives; the pauses between them make half a minute."""
_FIRST_PAUSE_SECONDS = 1.0
_BLOCK_BYTES = 2**20
_AGAIN = "run the same command again, which continues"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. oid: hex SHA-256 of a large file's content, else git's SHA-1 of the blob."""

    name: str
    size: int
    oid: str


@dataclass(frozen=True)
class Repository:
    """The files of a repository at one commit, by name. repo_type: "model" or "dataset"."""

    repo_id: str
    repo_type: str
    commit: str
    files: Mapping[str, HubFile]


class Hub:
    """The hub at HF_ENDPOINT, with a token of --token, HF_TOKEN or the library's login."""

    def __init__(self, token: str | None) -> None:
        try:
            from huggingface_hub import HfApi, constants, get_token
            from huggingface_hub.utils import build_hf_headers
        except ImportError:
            raise ValueError("a download needs huggingface_hub; pip install 'hbp-titan[hub]'") from None
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.has_token = bool(token or get_token())
        self._api = HfApi(endpoint=self.endpoint, token=token)
        self._headers = {
            **build_hf_headers(token=token),
            # Of a compressed answer, neither size nor ranges would be those of the file.
            "Accept-Encoding": "identity",
        }

    def list_files(self, repo_id: str, repo_type: str, revision: str) -> Repository:
        """Return the files of a repository. Raises ValueError if there is none, or no access."""
        from huggingface_hub.hf_api import RepoFile

        with self._errors(repo_id, repo_type, revision):
            commit = self._api.repo_info(repo_id, repo_type=repo_type, revision=revision).sha
            assert commit is not None
            tree = self._api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
            entries = [entry for entry in tree if isinstance(entry, RepoFile)]
        files = {}
        for entry in entries:
            _check_name(entry.path, repo_id)
            files[entry.path] = HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        return Repository(repo_id, repo_type, commit, files)

    def get(self, repository: Repository, file: HubFile, part: Path, report: Callable[[int], None]) -> None:
        """Write the content of a file to `part`, from where it ends; broken connections are continued.

        Raises ValueError if they stay broken, or if the hub ends the file early.

        report: called with the bytes of each block, negative if a hub without ranges starts again. What it raises ends
        the transfer.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        repo_id, repo_type = repository.repo_id, repository.repo_type
        url = hf_hub_url(repo_id, file.name, repo_type=repo_type, revision=repository.commit, endpoint=self.endpoint)
        attempts = 0
        with part.open("ab") as stream, self._errors(repo_id, repo_type, repository.commit, file.name):
            if stream.tell() > file.size:
                report(-_restart(stream))
            while (arrived := stream.tell()) < file.size:
                try:
                    self._receive(url, stream, report)
                    if stream.tell() <= arrived:
                        raise ValueError(
                            f"{repo_id}: {file.name}: the hub at {self.endpoint} ends the file after {stream.tell():,} "
                            f"of {file.size:,} bytes; check HF_ENDPOINT and proxies, then {_AGAIN}"
                        )
                except HTTPError as error:
                    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                    # As long as something arrives, a bad connection is still worth it.
                    attempts = 1 if stream.tell() > arrived else attempts + 1
                    if attempts == _ATTEMPTS or status not in (None, 408, 429, 500, 502, 503, 504):
                        raise
                    time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempts - 1))

    def _receive(self, url: str, stream: BinaryIO, report: Callable[[int], None]) -> None:
        """Append what follows the end of `stream`, until the hub has sent all or the connection breaks."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import hf_raise_for_status

        arrived = stream.tell()
        headers = {**self._headers, **({"Range": f"bytes={arrived}-"} if arrived else {})}
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if arrived and response.status_code == 200:
                # Not 206: the hub ignores ranges.
                report(-_restart(stream))
            for block in response.iter_bytes(_BLOCK_BYTES):
                stream.write(block)
                report(len(block))

    @contextmanager
    def _errors(self, repo_id: str, repo_type: str, revision: str, name: str = "") -> Iterator[None]:
        """Raise ValueError with what to do in place of the errors of the library."""
        from huggingface_hub import errors

        where = f"{repo_id}: {name}" if name else repo_id
        try:
            yield
        except errors.HFValidationError as error:
            raise ValueError(f"{repo_id!r} is not OWNER/NAME, the name of a repository: {error}") from None
        except errors.OfflineModeIsEnabled:
            raise ValueError("HF_HUB_OFFLINE forbids the download; unset it") from None
        except errors.GatedRepoError:
            raise ValueError(self._no_access(where)) from None
        except errors.RevisionNotFoundError:
            raise ValueError(self._no_revision(repo_id, repo_type, revision)) from None
        except errors.RepositoryNotFoundError:
            raise ValueError(self._no_repository(repo_id, repo_type)) from None
        except errors.EntryNotFoundError:
            raise ValueError(f"{where}: the hub at {self.endpoint} no longer has this file; start again") from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise ValueError(self._no_access(where)) from None
            what = f"later, {_AGAIN}" if status >= 429 else format_error(error)
            raise ValueError(f"{where}: the hub at {self.endpoint} answered {status}; {what}") from None
        except errors.HTTPError as error:
            why = f"{type(error).__name__}: {format_error(error)}"
            raise ValueError(
                f"{where}: no connection to the hub at {self.endpoint} ({why}); check HF_ENDPOINT and the network, "
                f"then {_AGAIN}"
            ) from None

    def _no_access(self, where: str) -> str:
        if self.has_token:
            return f"{where}: the token has no access; ask for it on the repository's page, or use another HF_TOKEN"
        return (
            f"{where}: restricted; accept its conditions on the repository's page, then set HF_TOKEN (or --token) to a "
            "token of that account"
        )

    def _no_repository(self, repo_id: str, repo_type: str) -> str:
        from huggingface_hub.errors import HTTPError

        other = "dataset" if repo_type == "model" else "model"
        with suppress(HTTPError):
            self._api.repo_info(repo_id, repo_type=other)
            return f"{repo_id} is a {other}; {'add' if other == 'dataset' else 'remove'} --dataset"
        token = "the token cannot read it" if self.has_token else "it needs a token (HF_TOKEN or --token)"
        return f"{repo_id}: no such {repo_type} on the hub at {self.endpoint}, or {token}"

    def _no_revision(self, repo_id: str, repo_type: str, revision: str) -> str:
        from huggingface_hub.errors import HTTPError

        names: list[str] = []
        # Some hubs do not list them.
        with suppress(HTTPError):
            refs = self._api.list_repo_refs(repo_id, repo_type=repo_type)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
        found = f"; it has {first_n(names, 10)}{did_you_mean(revision, names)}" if names else ""
        return f"{repo_id}: no revision {revision}{found}"


def _restart(stream: BinaryIO) -> int:
    """Empty a file that is open for appending; return how long it was."""
    length = stream.tell()
    stream.truncate(0)
    stream.seek(0)
    return length


def _check_name(name: str, repo_id: str) -> None:
    """Raise ValueError for a name that would leave the folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name:
        raise ValueError(f"{repo_id}: {name!a} is not a path inside the repository")
