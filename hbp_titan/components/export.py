"""The export at the end of a run: what it takes over from the base and from the training, and its folders.

Owns the token ids at which the exported model stops: the base's, its tokenizer's, and the ends of trained turns.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from hbp_titan.components.checkpoint import read_state
from hbp_titan.components.dcp_storage import TORCH_DTYPES
from hbp_titan.components.weights import is_checkpoint, whole_model_tensors
from hbp_titan.config import JobConfig
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import barrier
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.hf_config import TOKEN_ID_KEYS, token_ids_from_hf
from hbp_titan.models.hf_export import EXPORT_DTYPES, save_adapter_folder, save_hf_folder
from hbp_titan.models.lora import ALL_LINEAR, merged


def export_settings(config: JobConfig, args: ModelArgs, store: TokenStore) -> dict[str, Any]:
    """Return what the export needs besides the tensors, as JSON values; checkpoints hold it for convert_to_hf.py."""
    return {
        "tokenizer_path": str(config.tokenizer_path),
        "token_ids": token_ids(config, store),
        "chat_template": store.meta["served_template"],
        "eos_token": eos_token(store),
        "base_path": next((path for path in _base_folders(config) if (Path(path) / "config.json").is_file()), ""),
        "export_dtype": config.checkpoint.export_dtype or initial_dtype(config.weights_path, args, config),
    }


def _base_folders(config: JobConfig) -> list[str]:
    return list(dict.fromkeys(filter(None, (config.weights_path, config.model.hf_path))))


def initial_dtype(path: str, args: ModelArgs, config: JobConfig) -> str:
    """Return the dtype of the weights that the run starts from: on disk that of most elements; new: training.dtype."""
    if not path:
        return config.training.dtype
    if is_checkpoint(path):
        return str(read_state(Path(path)).get("export_dtype", "float32"))
    name = str(TORCH_DTYPES[HFTensors(path, args).dtypes[0]]).removeprefix("torch.")
    return name if name in EXPORT_DTYPES else "float32"


def token_ids(config: JobConfig, store: TokenStore) -> dict[str, Any]:
    """Return bos, eos and pad token ids of the export.

    eos: those of the base's folder, of the tokenizer's, and the ends of trained turns, because the model must stop at
    any of them. bos and pad: the first that one of these has.
    """
    found: dict[str, Any] = {}
    stops: list[int] = []
    for folder in dict.fromkeys((config.model.hf_path, config.weights_path, str(config.tokenizer_path))):
        ids = token_ids_from_hf(folder) if folder else {}
        stops += _as_list(ids.pop("eos_token_id", None))
        found = {**ids, **found}
    found = {**{"pad_token_id": store.meta["pad_token_id"]}, **found}
    stops += [*_as_list(store.meta["eos_token_id"]), *(index for index, _, _ in store.turn_ends if index >= 0)]
    stops = list(dict.fromkeys(stops))
    found["eos_token_id"] = (stops if len(stops) > 1 else stops[0]) if stops else None
    return {key: found[key] for key in TOKEN_ID_KEYS if found.get(key) is not None}


def eos_token(store: TokenStore) -> str:
    """Return the text of the token that ends most trained turns; "" if none does or it is the tokenizer's eos_token."""
    ends: Counter[tuple[int, str]] = Counter()
    for index, text, count in store.turn_ends:
        if index >= 0:
            ends[index, text] += count
    if not ends or store.meta["eos_token_id"] in [index for index, _ in ends]:
        return ""
    return ends.most_common(1)[0][0][1]


def turn_end_warnings(config: JobConfig, store: TokenStore) -> list[str]:
    """Return a line for trained turns that end with no control token, and one for ends that do not stop the base."""
    lines = []
    unended = sum(count for index, _, count in store.turn_ends if index < 0)
    if unended:
        total = sum(count for _, _, count in store.turn_ends)
        lines.append(
            f"{unended:,} of {total:,} trained turns end without a control token, so the model may never stop; "
            "use another chat template (data.chat_template)"
        )
    known, where = store.meta["eos_token_id"], "the tokenizer's eos_token"
    for folder in filter(None, (config.weights_path, config.model.hf_path)):
        if (found := token_ids_from_hf(folder).get("eos_token_id")) is not None:
            known, where = found, f"eos_token_id of {folder}"
    others = [f"{text} ({index})" for index, text, _ in store.turn_ends if index >= 0 and index not in _as_list(known)]
    if others:
        lines.append(
            f"trained turns end with {', '.join(others)}, where a model with {where} = {known} does not stop; "
            "the export gets these as further eos ids"
        )
    return lines


def _as_list(ids: Any) -> list[Any]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def export(model: nn.Module, args: ModelArgs, config: JobConfig, settings: dict[str, Any]) -> str:
    """Write hf/ in the run folder, with LoRA hf_adapter/ as well; return the lines that name them. A collective.

    settings: of `export_settings`. Existing folders are replaced. Adapters are merged into their matrices on the CPU in
    fp32, before rounding.
    """
    lora, folder = config.lora, config.dump_folder
    dtype = EXPORT_DTYPES[settings["export_dtype"]]
    changed: list[str] = []
    base_path = config.weights_path
    # Adapters are small and needed twice; the base is gathered one tensor at a time.
    adapter = dict(whole_model_tensors(model, adapters=True))
    tensors = whole_model_tensors(model, adapters=False)
    if dist.get_rank() == 0:
        changed = save_hf_folder(
            args,
            merged(tensors, adapter, lora.alpha / lora.rank) if lora.rank else tensors,
            folder / "hf",
            dtype=dtype,
            overwrite=True,
            **{key: value for key, value in settings.items() if key != "export_dtype"},
        )
        if lora.rank:
            # Named one by one: PEFT may count other matrices as all-linear.
            modules = list(dict.fromkeys(name.split(".")[-3] for name in adapter))
            save_adapter_folder(
                args,
                adapter,
                folder / "hf_adapter",
                rank=lora.rank,
                alpha=lora.alpha,
                target_modules=modules if lora.target_modules == [ALL_LINEAR] else lora.target_modules,
                base=base_path if base_path and (Path(base_path) / "config.json").is_file() else None,
                tokenizer_path=folder / "hf",
            )
    else:
        # Each tensor is gathered by a collective when rank 0 asks for it.
        for _ in tensors:
            pass
    barrier()
    template = ", with the chat template of training" if settings["chat_template"] else ""
    adapters = [f"PEFT adapter {folder / 'hf_adapter'}"] if lora.rank else []
    return "\n".join([f"HF weights   {folder / 'hf'} in {settings['export_dtype']}{template}", *adapters, *changed])
