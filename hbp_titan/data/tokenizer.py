"""Tokenizer folders in the HF layout: reading any of them, training the embedded byte-level BPE, text -> token ids.

Owns what is read from tokenizer.json, tokenizer_config.json, added_tokens.json and chat_template.jinja; only data is
read, no code that a folder names is imported or run. Owns how tokens are matched with spans of the text: by counting
bytes for byte-level tokenizers, whose token names spell their bytes; else by the offsets of the tokenizers library,
which take a fifth of its time.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from hbp_titan.models.hf_files import check_tokenizer_folder, tokenizer_files

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 4096

# In the order in which transformers adds those that no file lists.
_SPECIAL_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")

CHATML_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The split of Llama 3's tokenizer: words with their leading space or mark, up to three digits, punctuation with line
# ends, blanks. It keeps indentation whole, which suits source code.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class TokenizerFolder:
    """The content of a tokenizer folder.

    config: tokenizer_config.json, with special_tokens_map.json where transformers reads that. chat_template: the
    template's source, "" if there is none. tool_template: that of conversations with tools where they have another,
    else "". template_name: where chat_template comes from, for messages; an absolute path if from elsewhere.
    """

    path: Path
    config: dict[str, Any]
    chat_template: str
    tool_template: str = ""
    template_name: str = "chat_template.jinja"

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens that a template may use: bos_token, eos_token, pad_token, unk_token, ..."""
        tokens = {}
        for name, value in self.config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
        return tokens

    def load(self, post_processor: bool = False) -> Tokenizer:
        """Load tokenizer.json with the tokens that the other files add, as transformers.AutoTokenizer has them.

        post_processor: keep the one of the file, which adds a prefix.
        Raises ValueError if it is not a tokenizer, or a file gives a token another id than the tokenizer has.
        """
        file = self.path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{file}: not a tokenizer: {error}") from None
        listed = {token["content"]: token["id"] for token in _read_json(file).get("added_tokens") or ()}
        _check_ids(tokenizer, listed, file)
        self._add_tokens(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if post_processor:
            return tokenizer
        # The folder's own post-processor would add a prefix, which the template writes already, and trim blanks off the
        # offsets, which the loss mask needs to cover every character.
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return tokenizer

    def _add_tokens(self, tokenizer: Tokenizer) -> None:
        """Add the tokens that the folder's other files have, in the order in which transformers (5.24) does."""
        present = {token.content: repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
        before = {index: name for name, index in tokenizer.get_vocab(with_added_tokens=True).items()}
        file, listed = self._listed_tokens()
        # added_tokens.json has no flags: there, those of tokenizer.json win. Other flags update a token.
        keeps_flags = file.name == "added_tokens.json"
        added = [
            token
            for _, token in sorted(listed.items())
            if not (token.content in present if keeps_flags else present.get(token.content) == repr(token))
        ]
        named = set(self.special_tokens.values())
        for token in added:
            token.special = token.special or token.content in named
        # Special tokens that are only named get the next free id.
        known = {*present, *(token.content for token in listed.values())}
        unlisted = {token.content: token for token in self._special_tokens() if token.content not in known}
        tokenizer.add_tokens([*added, *unlisted.values()])
        _check_ids(tokenizer, {token.content: index for index, token in listed.items()}, file, before)
        ids = {name: tokenizer.token_to_id(name) for name in unlisted}
        _check_ids(tokenizer, ids, self.path / "tokenizer_config.json", before)

    def _listed_tokens(self) -> tuple[Path, dict[int, AddedToken]]:
        """Return the file that lists added tokens, and the tokens by id."""
        file = self.path / "tokenizer_config.json"
        if "added_tokens_decoder" not in self.config:
            file = self.path / "added_tokens.json"
            special = {token.content for token in self._special_tokens()}
            entries: dict[Any, Any] = {
                index: {"content": name, "normalized": name not in special, "special": name in special}
                for name, index in _read_json(file).items()
            }
        else:
            entries = self.config["added_tokens_decoder"]
        try:
            return file, {int(index): AddedToken(**token) for index, token in entries.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: added tokens are not a token for each id: {error}") from None

    def _special_tokens(self) -> list[AddedToken]:
        """Return the special tokens that the folder names, with their flags, in the order of transformers."""
        own = [key for key in self.config if key.endswith("_token") and key not in _SPECIAL_KEYS]
        own.sort(key=lambda key: isinstance(self.config[key], str))
        values = [self.config.get(key) for key in (*_SPECIAL_KEYS, *own)]
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        values += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
        tokens = []
        for value in values:
            if isinstance(value, str):
                tokens.append(AddedToken(value, special=True))
            elif isinstance(value, dict) and isinstance(value.get("content"), str):
                flags = {flag: bool(value[flag]) for flag in _TOKEN_FLAGS if flag in value}
                tokens.append(AddedToken(value["content"], special=True, **flags))
        return tokens


def read_tokenizer_folder(path: Path, chat_template: Path | None = None) -> TokenizerFolder:
    """Read the tokenizer folder at `path`; raises ValueError for a missing or broken file.

    chat_template: a file that replaces the folder's own templates, also for conversations with tools.
    """
    check_tokenizer_folder(path)
    config = _read_json(path / "tokenizer_config.json")
    # As transformers has it: the older file wins, unless a newer version has written the configuration.
    if "added_tokens_decoder" not in config:
        config |= _read_json(path / "special_tokens_map.json")
    if chat_template is not None:
        return TokenizerFolder(path, config, _read_text(chat_template), template_name=str(chat_template.resolve()))
    templates = _template_files(path) or _listed_templates(path, config)
    if templates and "default" not in templates:
        raise ValueError(
            f"{path}: has the chat templates {', '.join(templates)}, but none named default; save one as "
            "chat_template.jinja, or set data.chat_template"
        )
    (template, name), (tool_template, _) = (templates.get(key, ("", "")) for key in ("default", "tool_use"))
    return TokenizerFolder(path, config, template, tool_template, name)


def _template_files(path: Path) -> dict[str, tuple[str, str]]:
    """Return source and file of the templates that a folder has as files, by name."""
    files = [name for name in tokenizer_files(path) if name.endswith(".jinja")]
    names = ["default" if file == "chat_template.jinja" else Path(file).stem for file in files]
    return {name: (_read_text(path / file), file) for name, file in zip(names, files, strict=True)}


def _listed_templates(path: Path, config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return source and file of the templates in tokenizer_config.json, by name; files take precedence over these."""
    found, name = config.get("chat_template") or {}, "tokenizer_config.json"
    if isinstance(found, str):
        found = {"default": found}
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        # Older folders list several templates by name.
        found = {entry.get("name"): entry.get("template") for entry in found}
    if not isinstance(found, dict) or not all(isinstance(text, str) for item in found.items() for text in item):
        raise ValueError(f"{path / name}: chat_template is neither a string nor a list of named templates")
    return {key: (template, name) for key, template in found.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8: {error}") from None


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Train a byte-level BPE of `vocab_size` entries on `texts` and write it to `folder` as an HF tokenizer.

    The same texts give the same bytes. transformers.AutoTokenizer can load the folder.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_ids(
    tokenizer: Tokenizer, listed: Mapping[str, int | None], file: Path, before: Mapping[int, str] | None = None
) -> None:
    """Raise ValueError unless each token has the id that `file` lists, which no other token has.

    before: the tokens of tokenizer.json by id, if `file` is another one.
    """
    names = set((before or {}).values())
    for name, index in listed.items():
        found = tokenizer.token_to_id(name)
        other = name if before is None or index is None else before.get(index, name)
        if found == index and other == name:
            continue
        if other != name:
            reason = f"tokenizer.json gives that id to {other!r}"
        elif before is None or name in names:
            reason = f"the tokenizer gives it {found}"
        else:
            reason = f"tokenizer.json lacks it, and when added it gets {found}"
        raise ValueError(
            f"{file}: the token {name!r} has the id {index}, but {reason}; make the tokenizer's files agree"
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object")
    return value


Span = tuple[int, int]


class TextEncoder:
    """A tokenizer that also returns which tokens overlap given spans of the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        values = json.loads(tokenizer.to_str())
        normalizers = _sequence(values["normalizer"], "normalizers")
        self._composes = any(normalizer["type"] == "NFC" for normalizer in normalizers)
        lossless = all(normalizer["type"] == "NFC" for normalizer in normalizers)
        self._token_bytes = _token_bytes(tokenizer) if lossless and _is_byte_level(values) else None

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Return token ids [L] uint32, and int64 [n, 2]: first token and end of the tokens that share a character with
        each of `spans`, which are in order; equal if there is none.

        Raises ValueError for a text with an unpaired surrogate.
        """
        if self._token_bytes is not None and (not self._composes or unicodedata.is_normalized("NFC", text)):
            size = len(_utf8(text))
            ids = _ids(self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])
            ends = np.cumsum(self._token_bytes[ids])
            # Shorter if an added token consumes the blanks around it: then only the offsets are right.
            if size == (ends[-1] if len(ends) else 0):
                places = np.array(spans, dtype=np.int64).reshape(-1, 2)
                if size > len(text):
                    places = _byte_places(text, places)
                # A token that ends where a span begins is before it.
                first = np.searchsorted(ends, places[:, 0], side="right")
                end = np.where(places[:, 0] < places[:, 1], np.searchsorted(ends, places[:, 1]) + 1, first)
                return ids, np.array([first, end]).T
        _utf8(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return _ids(encoding), token_ranges(encoding, spans)


def token_ranges(encoding: Encoding, spans: Sequence[Span]) -> NDArray[np.int64]:
    """Return first token and end of the tokens that share a character with each span, as transformers' assistant mask
    does: int64 [n, 2]; equal if there is none."""
    # Not char_to_token, which returns None for a merged Encoding.
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    ranges = np.zeros((len(spans), 2), dtype=np.int64)
    # The last token that begins before each token's end: offsets of the library do not always increase.
    starts, ends = np.minimum.accumulate(offsets[::-1, 0])[::-1], np.maximum.accumulate(offsets[:, 1])
    for number, (start, end) in enumerate(spans):
        low, high = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(starts, end))
        inside = low + np.flatnonzero((offsets[low:high, 0] < end) & (offsets[low:high, 1] > start))
        if len(inside):
            ranges[number] = inside[0], inside[-1] + 1
    return ranges


def _byte_places(text: str, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the byte offsets in UTF-8 of character offsets."""
    characters = np.unique(places)
    sizes = [len(text[start:end].encode()) for start, end in itertools.pairwise([0, *characters.tolist()])]
    return np.cumsum(sizes)[np.searchsorted(characters, places)]


def _ids(encoding: Encoding) -> NDArray[np.uint32]:
    # numpy converts an array ten times as fast as a list of ints.
    return np.array(array("I", encoding.ids))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a message contains an unpaired surrogate (U+{ord(text[error.start]):04X})") from None


def _sequence(value: dict[str, Any] | None, items: str) -> list[dict[str, Any]]:
    """Return the normalizers or pre-tokenizers of a tokenizer.json entry as a flat list."""
    if value is None:
        return []
    if value["type"] == "Sequence":
        return [inner for item in value[items] for inner in _sequence(item, items)]
    return [value]


def _is_byte_level(values: dict[str, Any]) -> bool:
    """Return whether each token's name spells its bytes, one character per byte, and no byte of the text is lost."""
    model, steps = values["model"], _sequence(values["pre_tokenizer"], "pretokenizers")
    keeps = all(
        step["type"] in ("Split", "Digits", "ByteLevel")
        and step.get("behavior") != "Removed"
        and not step.get("add_prefix_space")
        for step in steps
    )
    return (
        model["type"] == "BPE"
        and not model.get("byte_fallback")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and keeps
        and any(step["type"] == "ByteLevel" for step in steps)
    )


def _token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Return how many bytes of text each id of a byte-level tokenizer stands for, [V]."""
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token_bytes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for name, index in vocabulary.items():
        token_bytes[index] = len(name.encode()) if index in added else len(name)
    return token_bytes
