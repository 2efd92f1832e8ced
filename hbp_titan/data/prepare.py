"""The token stores of a configuration: find them by fingerprint, or build them first.

Owns the question which set of samples a configuration asks for, its fingerprint (SHA-256 over everything that the
tokens depend on), and the checks that a run makes of a finished set. A run whose stores exist imports nothing else of
the preparation: data/build_set.py with the readers, templates and tokenizers is imported only if a set is missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp_titan.config import JobConfig
from hbp_titan.data.files import DataFiles, chat_template_file, source_files
from hbp_titan.data.token_store import (
    FORMAT_VERSION,
    TokenizeConfig,
    TokenStore,
    check_fits,
    check_malformed,
    check_strict,
    read_meta,
)
from hbp_titan.errors import WorkerGroup
from hbp_titan.job_config import DataSource
from hbp_titan.models.hf_files import check_tokenizer_folder, tokenizer_files
from hbp_titan.utils import atomic_write, sha256_file, sha256_text


def open_stores(config: JobConfig, max_sample_tokens: int, workers: WorkerGroup | None = None) -> list[TokenStore]:
    """Return the training store and, if the configuration has one, the validation store; as `prepare`."""
    folders = prepare(config, max_sample_tokens=max_sample_tokens, workers=workers)
    return [TokenStore.open(folder) for folder in folders if folder is not None]


def prepare(
    config: JobConfig, progress: bool = True, max_sample_tokens: int | None = None, workers: WorkerGroup | None = None
) -> tuple[Path, Path | None]:
    """Return the folder of the training store and, if the configuration has one, of the validation store.

    Builds the embedded corpus and the stores that do not exist yet; finds existing ones in well under a second. All
    ranks of `workers` must call it. The validation store comes from data.validation_files, data.validation_sources or
    validation.share, and the last is limited by validation.max_samples.
    max_sample_tokens: longest sample in tokens; None takes the largest level's.
    Raises UserError for malformed rows, and ValueError for a longer sample if data.max_length_policy is "error".
    """
    workers = workers or WorkerGroup()
    # One rank builds it, and all wait: the others would read half-written files.
    if config.data.embedded:
        workers.report(f"building the corpus in {config.data.embedded_folder}")
        workers.run_on_all(lambda: _ensure_corpus(Path(config.data.embedded_folder)) if workers.rank == 0 else None)
    if max_sample_tokens is None:
        if not config.levels:
            raise ValueError("levels: none is given; add at least one [[levels]] block (select_levels.py chooses them)")
        max_sample_tokens = config.levels[-1].max_tokens
    training = SetRequest(config, _named_sources(config, "train"), config.data.max_samples, max_sample_tokens)
    folder = _find_or_build(training, workers, progress)
    validation = None
    if named := _named_sources(config, "validation"):
        validation = dataclasses.replace(training, sources=named, max_samples=config.validation.max_samples)
    elif config.validation.share:
        validation = dataclasses.replace(training, holds_out=True)
    return folder, _find_or_build(validation, workers, progress) if validation else None


def _ensure_corpus(folder: Path) -> None:
    # The only use of experiments/ in the core: the default configuration must run without any data at hand.
    from hbp_titan.experiments.corpus import ensure_stdlib_corpus

    ensure_stdlib_corpus(folder)


def _named_sources(config: JobConfig, key: str) -> list[tuple[str, DataSource]]:
    """Return the sources of the training or the validation set, each with its configuration key."""
    data = config.data
    if key == "train":
        files, blocks, blocks_key = data.train_files, data.sources, "data.sources"
    else:
        files, blocks, blocks_key = data.validation_files, data.validation_sources, "data.validation_sources"
    short = [(f"data.{key}_files", DataSource(path=path)) for path in files]
    return short + [(f"{blocks_key}[{number}]", source) for number, source in enumerate(blocks, start=1)]


@dataclass(frozen=True)
class SetRequest:
    """One set of samples that a configuration asks for.

    sources: each with its configuration key. max_samples: rows of all of them together. holds_out: whether the set has
    the samples that validation.share takes from training; without it, the set has the others.
    """

    config: JobConfig
    sources: list[tuple[str, DataSource]]
    max_samples: int
    max_sample_tokens: int
    holds_out: bool = False

    def tokenize_config(self) -> TokenizeConfig:
        """Return the tokenization settings that all sources share."""
        data = self.config.data
        settings = TokenizeConfig(
            self.config.tokenizer_path,
            data.train_on,
            max_row_bytes=data.max_row_bytes,
            chat_template=chat_template_file(data.chat_template),
            chat_template_kwargs=data.chat_template_kwargs,
            template_date=data.template_date,
            reasoning=data.reasoning,
            empty_answers=data.empty_answers,
        )
        if data.max_length_policy == "error":
            return settings
        return dataclasses.replace(
            settings, max_tokens=self.max_sample_tokens, max_length_policy=data.max_length_policy
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide which samples are drawn, as JSON values."""
        data, validation = self.config.data, self.config.validation
        settings = {"max_samples": self.max_samples, "duplicates": data.duplicates, "seed": self.config.seed_of("data")}
        if validation.share:
            limit = validation.max_samples if self.holds_out else 0
            settings |= {"share": validation.share, "holds_out": self.holds_out, "max_held_out": limit}
        return settings


@dataclass(frozen=True)
class SourceFiles:
    """The data files of each source of a set, and what identifies their content.

    sources: the files of each. contents: name and digest of each file of each source. base: what the fingerprints of
    all sources share.
    """

    sources: list[DataFiles]
    contents: list[list[list[str]]]
    base: dict[str, Any]

    def places(self) -> list[dict[str, Any]]:
        """Return where the files of each source are, as JSON values: what a set knows of this run alone."""
        return [
            {
                "files": [str(file) for file in source.files],
                "unread_files": [
                    {"file": str(file), "bytes": file.stat().st_size, "reason": reason}
                    for file, reason in source.unread.items()
                ],
            }
            for source in self.sources
        ]


def _find_or_build(request: SetRequest, workers: WorkerGroup, progress: bool) -> Path:
    """Return the folder of the set, built if it does not exist, after the checks that the configuration asks for."""
    _check_mappings(request)
    found = _source_files(request, workers)
    # Paths are left out: moved data keeps its stores. A folder's name stays: it names rows.
    blocks = [
        {**dataclasses.asdict(source), "path": "", "folder": files.name}
        for (_, source), files in zip(request.sources, found.sources, strict=True)
    ]
    digest = fingerprint({**found.base, "sources": found.contents, "blocks": blocks, **request.settings()})
    folder = Path(request.config.data.cache_folder) / f"set-{digest[:16]}"
    # All ranks must agree: a shared file system may show a new folder to some of them only.
    if not all(workers.gather(folder.is_dir())):
        # Imported here: a run with finished stores needs no readers, templates or tokenizers.
        from hbp_titan.data.build_set import build_set

        build_set(request, found, folder, digest, workers, progress)
    workers.run_on_all(lambda: _record_places(folder, found.places()) if workers.rank == 0 else None)
    workers.run_on_all(lambda: _check(request, TokenStore.open(folder)))
    return folder


def _record_places(folder: Path, places: list[dict[str, Any]]) -> None:
    """Record where this run's data is: another run may have built the set from a copy elsewhere."""
    # A shared cache may belong to another user.
    if read_meta(folder).get("places") != places and os.access(folder, os.W_OK):
        from hbp_titan.data.build_set import record_places

        record_places(folder, places)


def _check_mappings(request: SetRequest) -> None:
    # Before any file is read: hashing large files only to report a wrong key would take minutes.
    from hbp_titan.data.formats import check_mapping, check_variables

    check_variables(request.config.data.chat_template_kwargs, "data.chat_template_kwargs")
    for key, source in request.sources:
        check_mapping(source.format, source.columns, source.roles, key)


def _source_files(request: SetRequest, workers: WorkerGroup) -> SourceFiles:
    sources = [source_files(source, key) for key, source in request.sources]
    tokenizer = request.config.tokenizer_path
    # Before large files are read for their digests.
    check_tokenizer_folder(tokenizer, f"model.{'tokenizer_path' if request.config.model.tokenizer_path else 'hf_path'}")
    settings = request.tokenize_config()
    named = {name: tokenizer / name for name in tokenizer_files(tokenizer)}
    if settings.chat_template:
        named["data.chat_template"] = settings.chat_template
    all_files = [*named.values(), *(file for source in sources for file in source.files)]
    cache = Path(request.config.data.cache_folder)
    digests = dict(zip(all_files, file_digests(all_files, cache / "digests", workers), strict=True))
    base = {
        "tokenizer": [[name, digests[file]] for name, file in named.items()],
        "settings": settings.values(),
        "format": FORMAT_VERSION,
    }
    # The name of a file counts without its folder, because it names the source of its rows.
    contents = [[[file.name, digests[file]] for file in source.files] for source in sources]
    return SourceFiles(sources, contents, base)


def _check(request: SetRequest, store: TokenStore) -> None:
    config = request.config
    if config.data.malformed == "error":
        check_malformed(store, config.data.max_errors_shown)
    if config.data.strict:
        check_strict(store, config.data.max_errors_shown)
    by_level = config.levels and request.max_sample_tokens == config.levels[-1].max_tokens
    limit = () if by_level else ("packing.max_sample_tokens (or the model's limit)",)
    check_fits(store, request.max_sample_tokens, *limit)


def fingerprint(parts: Any) -> str:
    """Return the hex SHA-256 of a JSON value."""
    return sha256_text(json.dumps(parts, sort_keys=True))


def file_digests(files: Sequence[Path], cache: Path, workers: WorkerGroup) -> list[str]:
    """Return the hex SHA-256 of each file's content; each rank reads its share.

    cache: folder that keeps digests by (path, size, mtime_ns), so that unchanged files are not read again.
    """

    def read_own() -> dict[int, str]:
        own = {}
        for number in workers.share(len(files)):
            workers.report(f"hashing {files[number]}")
            own[number] = _cached_digest(files[number], cache)
        return own

    merged: dict[int, str] = {}
    for found in workers.run_on_all(read_own):
        merged.update(found)
    return [merged[number] for number in range(len(files))]


def _cached_digest(file: Path, cache: Path) -> str:
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    cached = cache / sha256_text(key)[:32]
    try:
        digest = cached.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        digest = ""
    # Anything else is a file that a full disk has cut.
    if len(digest) != 64:
        digest = sha256_file(file)
        # Kept to save time only: a full or read-only disk need not end a run whose stores exist.
        with suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            atomic_write(cached, digest)
    return digest
