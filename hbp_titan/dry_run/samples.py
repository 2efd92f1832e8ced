"""The samples of a dry run: the user's own where they are on this machine, else synthetic ones.

Owns the choice and how it is told. The user's are prepared as a start prepares them, with every check of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hbp_titan.config import JobConfig
from hbp_titan.data.chat.chat_template import ChatTokenizer
from hbp_titan.data.store.prepare import open_stores
from hbp_titan.models.decoder import ModelArgs
from hbp_titan.packing.synthetic import tulu3_longcite_like
from hbp_titan.preflight import check_vocabulary, most_tokens

# As many as the paper's mixture has.
SYNTHETIC_SAMPLES = 941_344


@dataclass(frozen=True)
class Samples:
    """lengths, loss_tokens: int64 [num_samples]; origin: what they are, in words."""

    lengths: NDArray[np.int64]
    loss_tokens: NDArray[np.int64]
    origin: str


def samples_of(config: JobConfig, args: ModelArgs) -> Samples:
    """The training samples of `config`; synthetic ones where none of its sources is on this machine.

    Raises what a start would raise for these data, their tokenizer, and held-out data.
    """
    paths = [*config.data.train_files, *(source.path for source in config.data.sources)]
    if any(Path(path).expanduser().exists() for path in paths):
        store = open_stores(config, most_tokens(config, args))[0]
        check_vocabulary(config, args, store.meta["vocab_size"])
        return Samples(store.lengths, store.loss_tokens, f"your data: {len(store):,} samples")
    if _names_tokenizer(config):
        check_vocabulary(config, args, ChatTokenizer(config.tokenizer_path).vocab_size)
    return _synthetic(most_tokens(config, args), paths[0])


def _names_tokenizer(config: JobConfig) -> bool:
    """Whether a tokenizer is named that should be there: that of the embedded corpus is made with the corpus."""
    if not (config.model.tokenizer_path or config.model.hf_path):
        return False
    return not config.data.embedded or config.tokenizer_path.exists()


def _synthetic(limit: int, missing: str) -> Samples:
    lengths = tulu3_longcite_like(SYNTHETIC_SAMPLES)
    kept = lengths[lengths <= limit]
    left_out = f", {len(lengths) - len(kept):,} above {limit:,} tokens left out" if len(kept) < len(lengths) else ""
    return Samples(
        kept,
        kept - 1,
        f"SYNTHETIC data, because {missing} is not here: {len(kept):,} lengths like Tulu3 with LongCite{left_out}, all "
        "tokens but the first trained",
    )
