"""From a configuration to its token stores: what scripts/prepare_data.py and the trainer's first rank both run."""

from __future__ import annotations

from pathlib import Path

from hbp_titan.config import JobConfig
from hbp_titan.data.corpus import ensure_stdlib_corpus
from hbp_titan.data.token_store import TokenStore, build_token_store, check_fits


def prepare(config: JobConfig, progress: bool = True, most_tokens: int | None = None) -> tuple[Path, Path | None]:
    """Folders of the training store and, where data.validation_files names any, of the validation store.

    Builds the embedded corpus and the stores that are not there yet; what is there is found again in well under a
    second. The validation store takes its share by validation.max_samples. To be called by one process at a time.
    most_tokens: of a sample; None means those of the largest level.
    Raises ValueError for a malformed row and, unless data.overlong says otherwise, for a longer sample.
    """
    data = config.data
    if data.embedded:
        ensure_stdlib_corpus(Path(data.embedded_folder))
    if most_tokens is None:
        if not config.levels:
            raise ValueError("no level is given: add at least one [[levels]] block (scripts/select_levels.py chooses)")
        most_tokens = config.levels[-1].max_tokens
    train = _store(config, data.train_files, "data.train_files", data.max_samples, most_tokens, progress)
    if not data.validation_files:
        return train, None
    return train, _store(
        config, data.validation_files, "data.validation_files", config.validation.max_samples, most_tokens, progress
    )


def open_stores(config: JobConfig, most_tokens: int) -> list[TokenStore]:
    """The training store and, if any, the validation store, made where they are not there yet; as `prepare`."""
    folders = prepare(config, most_tokens=most_tokens)
    return [TokenStore.open(folder) for folder in folders if folder is not None]


def _store(config: JobConfig, files: list[str], key: str, max_samples: int, most_tokens: int, progress: bool) -> Path:
    folder = build_token_store(
        files,
        config.tokenizer_path,
        Path(config.data.cache_folder),
        num_proc=config.data.num_proc,
        max_samples=max_samples,
        max_tokens=0 if config.data.overlong == "error" else most_tokens,
        overlong=config.data.overlong,
        progress=progress,
        key=key,
    )
    limit = () if config.levels else ("packing.auto_max_tokens (or the model's limit)",)
    check_fits(TokenStore.open(folder), most_tokens, *limit)
    return folder
