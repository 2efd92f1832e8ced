"""HF model folders out: config.json, generation_config.json, safetensors, tokenizer and licence files; PEFT adapters.

Owns what a folder of fine-tuned weights takes over from its base, and what must agree with the training: token ids, the
chat template and the token that ends a turn. Which file decides where an answer ends: transformers reads
generation_config.json, vLLM that and tokenizer_config.json's eos_token, llama.cpp's converter tokenizer_config.json's
eos_token alone. So all of them name the end of the trained turns.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf import (
    INDEX_FILE,
    MAX_LISTED,
    SINGLE_FILE,
    export_dtype,
    hf_names,
    is_fused,
    parameter_shapes,
    parts_of_matrix,
    tied_names,
    to_hf_name,
)
from hbp_titan.models.hf_config import TOKEN_ID_KEYS, agrees_with_vllm, args_to_hf_config
from hbp_titan.models.hf_files import LICENSE, MODEL_CODE, check_not_pointer, read_json, tokenizer_files
from hbp_titan.utils import first_n

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GENERATION_FILE = "generation_config.json"
# Written as constants where the base says nothing about them.
_BASE_DECIDES = ("use_cache", "use_sliding_window", "sliding_window", "max_window_layers", "scoring_func", "ep_size")
# Settings of sampling with their defaults; transformers refuses to save other values without do_sample.
_SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
_PEFT_PREFIX = "base_model.model."
_BEAMS = {"early_stopping": False, "length_penalty": 1.0}
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


def save_hf_folder(
    args: ModelArgs,
    tensors: Iterable[tuple[str, Tensor]],
    out: str | Path,
    *,
    dtype: torch.dtype,
    tokenizer_path: str | Path | None = None,
    token_ids: Mapping[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    chat_template: str = "",
    eos_token: str = "",
    base_path: str | Path | None = None,
) -> list[str]:
    """Write a folder that transformers and vLLM load, atomically; return a line for each thing that had to change.

    tensors: (our name, whole tensor) pairs, each parameter once, in any order, consumed one at a time and stored in
        `dtype`; the output matrix of a tied model is skipped.
    tokenizer_path: folder from which tokenizer, chat template and sampling settings are copied.
    token_ids: bos_token_id, eos_token_id, pad_token_id for config.json; null if absent.
    max_shard_bytes: maximum size of a weight file.
    overwrite: replace `out` if it exists and is not empty; otherwise that is a ValueError.
    chat_template: source of the template that takes the place of the tokenizer's own.
    eos_token: text of the token that takes the place of tokenizer_config.json's, unless a template inserts that one.
    base_path: HF folder of the base model, whose other keys of config.json, sampling settings (if the tokenizer has
        none), licence files and model code are kept.

    Raises ValueError for unknown, repeated, missing or misshapen tensors and for unknown token_ids.
    """
    out = Path(out)
    unknown = set(token_ids or {}) - set(TOKEN_ID_KEYS)
    if unknown:
        raise ValueError(f"token_ids has {', '.join(sorted(unknown))}; use {', '.join(TOKEN_ID_KEYS)}")
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is not empty; pass another folder or remove it")
    source = None if tokenizer_path is None else Path(tokenizer_path)
    for file in [source / name for name in tokenizer_files(source, carried=True)] if source else ():
        check_not_pointer(file)
    base, lines = Path(base_path) if base_path else None, []
    if base and not base.is_dir():
        lines.append(f"{base} does not exist any more: its licence files and other keys of config.json are not carried")
        base = None
    config = exported_config(args, base, token_ids or {}, dtype)
    generation, changed = _generation_config([folder for folder in (source, base) if folder], config)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        _write_json(temporary / "config.json", config)
        _write_json(temporary / _GENERATION_FILE, generation)
        _write_weights(temporary, _checked(args, tensors, dtype), max_shard_bytes)
        if base:
            _copy_files(base, temporary, MODEL_CODE if "auto_map" in config else (), tokenizer=False)
        if source:
            _copy_files(source, temporary)
            _set_chat_template(temporary, chat_template)
            lines += _set_eos_token(temporary, eos_token)
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [*lines, *changed]


def exported_config(
    args: ModelArgs, base: Path | None, token_ids: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Return config.json: what `args` says, and every key of the config.json in `base` that it does not decide."""
    own = args_to_hf_config(args)
    path = base / "config.json" if base else None
    published = read_json(path) if path and path.is_file() else {}
    decided = [key for key in _BASE_DECIDES if published.get(key) is not None]
    kept = {key: value for key, value in published.items() if key not in own or key in decided}
    for key in ("rope_scaling", "rope_parameters") if args.hf_config is None else ():
        full, of_base = own[key] or {}, published.get(key) or {}
        if "full_attention" in full:
            full, of_base = full["full_attention"], of_base.get("full_attention") or of_base
        theirs = {name: value for name, value in of_base.items() if value is not None}
        if full and full["rope_type"] in (theirs.get("rope_type"), theirs.get("type")):
            if not agrees_with_vllm(theirs, full):
                del theirs["attn_factor"]
            full |= {**theirs, **full}
    name = str(dtype).removeprefix("torch.")
    # transformers before 4.56 and vLLM read torch_dtype, later versions dtype.
    return {**own, **kept, **token_ids, "dtype": name, "torch_dtype": name}


def _generation_config(folders: Sequence[Path], config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the first generation config of `folders`, with the token ids of `config`, and a line if it was changed."""
    path = next((folder / _GENERATION_FILE for folder in folders if (folder / _GENERATION_FILE).is_file()), None)
    carried = read_json(path) if path is not None else {}
    ids = {key: config[key] if config[key] is not None else _id(carried.get(key)) for key in TOKEN_ID_KEYS}
    sound = _sound_generation(carried)
    changed = [key for key in {**carried, **sound} if key not in TOKEN_ID_KEYS and carried.get(key) != sound.get(key)]
    lines = [
        f"{_GENERATION_FILE}: transformers refuses to save {path} as it is: "
        + ", ".join(f"{key} = {json.dumps(sound[key])}" if key in sound else f"{key} removed" for key in changed)
    ]
    return {**dict.fromkeys(TOKEN_ID_KEYS), **sound, **ids}, lines if changed else []


def _id(value: Any) -> Any:
    # Older folders have -1 for none.
    return None if isinstance(value, int) and value < 0 else value


def _sound_generation(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation settings without the contradictions that transformers refuses to save."""
    values = dict(values)

    def set_apart(defaults: Mapping[str, Any]) -> list[str]:
        return [key for key, default in defaults.items() if values.get(key) not in (None, default)]

    if values.get("do_sample") is not True and (sampling := set_apart(_SAMPLING)):
        if values.get("temperature") == 0:
            # Greedy by another name.
            values = {key: value for key, value in values.items() if key not in sampling}
        else:
            # What the file asks for, and what vLLM does with it.
            values["do_sample"] = True
    if values.get("num_beams") in (None, 1):
        values = {key: value for key, value in values.items() if key not in set_apart(_BEAMS)}
        if not values.get("do_sample") and (values.get("num_return_sequences") or 1) > 1:
            del values["num_return_sequences"]
    if values.get("return_dict_in_generate") is not True:
        values = {key: value for key, value in values.items() if not (key in _OUTPUTS and value)}
    if values.get("use_cache") is False:
        values.pop("cache_implementation", None)
    tokens = values.get("max_new_tokens")
    if tokens is not None and not (isinstance(tokens, int) and tokens > 0):
        del values["max_new_tokens"]
    return values


def _checked(
    args: ModelArgs, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    tied = tied_names(args)
    expected, matrices = parameter_shapes(args), dict[str, dict[str, Tensor]]()
    for fqn, tensor in tensors:
        if fqn in tied[1:]:
            continue
        shape = expected.pop(fqn, None)
        if shape is None:
            raise ValueError(f"model {args.name}: tensor {fqn} is unknown or repeated")
        if tensor.shape != shape:
            raise ValueError(f"model {args.name}: tensor {fqn} is of shape {list(tensor.shape)}, not {list(shape)}")
        tensor = tensor.detach().to("cpu", export_dtype(fqn, dtype))
        if dtype == torch.float16 and not tensor.isfinite().all():
            raise ValueError(f"tensor {fqn} exceeds the range of float16; use bfloat16 (checkpoint.export_dtype)")
        if args.hf_config is not None:
            from hbp_titan.models.transformers_weights import disk_layout

            yield from disk_layout(args.hf_config).split(fqn, tensor)
        elif is_fused(fqn):
            # Cloned, because safetensors rejects tensors that share memory.
            yield from (
                (name, part.clone())
                for name, part in zip(hf_names(fqn, shape, args.hf_model_type), tensor, strict=True)
            )
        elif matrix := parts_of_matrix(fqn, args.hf_model_type):
            name, parts = matrix
            found = matrices.setdefault(name, {})
            found[fqn] = tensor
            if len(found) == len(parts):
                yield to_hf_name(name), torch.cat([matrices[name].pop(part) for part in parts])
        else:
            yield to_hf_name(fqn, args.hf_model_type), tensor.contiguous()
    if expected:
        raise ValueError(f"model {args.name}: missing tensors {first_n(list(expected), MAX_LISTED)}")


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: float) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    shard_bytes = total_bytes = 0

    def close_shard() -> None:
        nonlocal shard, shard_bytes
        shards.append(list(shard))
        _save_file(shard, folder / f"shard-{len(shards)}")
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            close_shard()
        shard[name] = tensor
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    close_shard()
    # Renamed at the end, because file names contain the number of files.
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_FILE, index)


def save_adapter_folder(
    args: ModelArgs,
    adapter: Mapping[str, Tensor],
    out: Path,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str],
    base: str | None,
    tokenizer_path: Path,
) -> None:
    """Write `adapter` (whole tensors by our names) as a folder of HF PEFT's format, atomically, replacing `out`.

    In fp32: adapters are small, and rounded ones would not give the merged weights. Where HF has one matrix for several
    of ours (Phi-3), so has the folder: an adapter of the sum of their ranks.

    target_modules: last parts of the adapted matrices' names. base: the base model's HF folder, None if it has none.
    tokenizer_path: folder from which tokenizer, chat template and licence files are copied.
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        # An int in PEFT; vLLM rejects 16.0.
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": list(target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    whole = {fqn: tensor.detach().to("cpu", torch.float32).contiguous() for fqn, tensor in adapter.items()}
    if parts := {matrix for fqn in whole if (matrix := _matrix_of_adapter(fqn, args.hf_model_type))}:
        whole, ranks = _joined_adapters(whole, args, sorted(parts))
        # With r and alpha of the joined matrices both k times as large, the scaling alpha / r is the same.
        config["target_modules"] = sorted({name.removesuffix(".weight").rpartition(".lora_")[0] for name in whole})
        config["rank_pattern"] = ranks
        config["alpha_pattern"] = {name: alpha * joined // rank for name, joined in ranks.items()}
    tensors = {_PEFT_PREFIX + to_hf_name(fqn, args.hf_model_type): tensor for fqn, tensor in whole.items()}
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _save_file(tensors, temporary / "adapter_model.safetensors")
    _write_json(temporary / "adapter_config.json", config)
    _copy_files(tokenizer_path, temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def _matrix_of_adapter(fqn: str, model_type: str) -> tuple[str, tuple[str, ...]] | None:
    """Return `parts_of_matrix` of the matrix that an adapter's parameter adapts, both without "weight"."""
    matrix = parts_of_matrix(re.sub(r"lora_[AB]\.weight$", "weight", fqn), model_type)
    return matrix and (matrix[0].removesuffix("weight"), tuple(part.removesuffix("weight") for part in matrix[1]))


def _joined_adapters(
    adapter: dict[str, Tensor], args: ModelArgs, matrices: Sequence[tuple[str, tuple[str, ...]]]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the adapters by the names of HF's matrices but for their prefix, and the rank of each joined one."""
    shapes, ranks = parameter_shapes(args), {}
    for name, parts in matrices:
        adapted = [part for part in parts if f"{part}lora_A.weight" in adapter]
        a_RI = torch.cat([adapter.pop(f"{part}lora_A.weight") for part in adapted])
        # Each part's rows meet the rows of A that are its own.
        blocks = [
            adapter.pop(f"{p}lora_B.weight") if p in adapted else torch.zeros(shapes[f"{p}weight"][0], 0) for p in parts
        ]
        adapter |= {f"{name}lora_A.weight": a_RI, f"{name}lora_B.weight": torch.block_diag(*blocks)}
        ranks[name.removesuffix(".")] = len(a_RI)
    return adapter, ranks


def _copy_files(source: Path, out: Path, more: Sequence[str] = (), tokenizer: bool = True) -> None:
    """Copy licence files, tokenizer files and those that match a pattern of `more`, unless `out` has them."""
    names = [file.name for file in sorted(source.iterdir()) if LICENSE.fullmatch(file.name)]
    names += [file.name for pattern in more for file in sorted(source.glob(pattern))]
    for name in [*names, *(tokenizer_files(source, carried=True) if tokenizer else ())]:
        if (source / name).is_file() and not (out / name).exists():
            (out / name).parent.mkdir(exist_ok=True)
            # Not its mode: the folder's other files have the usual one, too.
            shutil.copyfile(source / name, out / name)


def _set_chat_template(folder: Path, template: str) -> None:
    """Make `template` the only one of `folder`; "" leaves those that it has."""
    if not template:
        return
    for name in tokenizer_files(folder, carried=True):
        if name.endswith(".jinja") or name == "chat_template.json":
            (folder / name).unlink()
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        # llama.cpp would take a template in it before the file, transformers after it.
        values = read_json(config)
        values.pop("chat_template", None)
        _write_json(config, values)


def _set_eos_token(folder: Path, token: str) -> list[str]:
    """Make `token` the tokenizer's eos_token, as Instruct models have it, and return a line; "" leaves it."""
    config = folder / "tokenizer_config.json"
    values = read_json(config) if token and config.is_file() else {}
    if not values:
        return []
    templates = [(folder / name).read_text(encoding="utf-8") for name in tokenizer_files(folder) if ".jinja" in name]
    before = values.get("eos_token")
    before = before.get("content") if isinstance(before, dict) else before
    if "eos_token" in "".join([*templates, json.dumps(values.get("chat_template"))]):
        # Another one would change what the template renders.
        return [
            f"tokenizer_config.json: eos_token stays {before}, because the chat template inserts it; vLLM and "
            f"transformers stop at {token} by {_GENERATION_FILE}, llama.cpp may not"
        ]
    for path in (config, folder / "special_tokens_map.json"):
        if path.is_file():
            found = read_json(path)
            if path == config or "eos_token" in found:
                _write_json(path, {**found, "eos_token": token})
    return [f"tokenizer_config.json: eos_token is {token}, which ends the trained turns, instead of {before}"]


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors 0.8 creates files that only their owner can read.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode & 0o777)


def _replace(temporary: Path, out: Path) -> None:
    # A folder cannot be renamed over a non-empty one; the old one moves aside first.
    if not out.exists():
        temporary.rename(out)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
