"""What an HF folder without safetensors has instead, and the command that converts it."""

from __future__ import annotations

from pathlib import Path

_AUTO = "from transformers import AutoModelForCausalLM as M; M.from_pretrained"
# In place, so that the tokenizer files stay next to the weights. transformers reads pickles with torch's safe loader.
_SAVE = "python -c \"{auto}('{folder}', dtype='auto'{option}).save_pretrained('{folder}')\""


def describe_other_weights(folder: Path) -> str:
    """Return "; ..." on the weights of another format in `folder`, with the fix; "" if there are none."""
    if (folder / "adapter_config.json").is_file():
        return "; it is a PEFT adapter: merge it into its base with PeftModel.merge_and_unload() and save the result"
    if found := _first(folder, "pytorch_model*.bin"):
        return f"; {found} is a pickle, which is not read: convert it with {_command(folder)}"
    if found := _first(folder, "*.gguf"):
        return f"; {found} is not read: convert it with {_command(folder, f', gguf_file={found!r}')}"
    if found := _first(folder, "consolidated*") or _first(folder, "*.pth"):
        return f"; {found} has the names of another layout: download the folder in the layout of transformers"
    if found := _first(folder, "model-*-of-*.safetensors") or _first(folder, "*.safetensors"):
        return f"; {found} is there, but the index that names its tensors is missing: download it as well"
    return ""


def _first(folder: Path, pattern: str) -> str:
    return min((file.name for file in folder.glob(pattern)), default="")


def _command(folder: Path, option: str = "") -> str:
    return _SAVE.format(auto=_AUTO, folder=folder, option=option)
