"""Convert a checkpoint to an HF folder.

    python scripts/convert_to_hf.py CHECKPOINT OUT [--dtype bfloat16]

CHECKPOINT is a step-N folder, or a run folder (its newest checkpoint). OUT gets config.json, safetensors and the
tokenizer files, for transformers, vLLM and SGLang. LoRA adapters are merged into their base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hbp_titan.components.checkpoint import completed_checkpoints, read_state
from hbp_titan.components.lora_checkpoint import whole_tensors
from hbp_titan.errors import exit_on_user_error
from hbp_titan.models.configs import ModelArgs
from hbp_titan.models.hf_export import EXPORT_DTYPES, save_hf_folder


def find_checkpoint(path: Path) -> Path:
    """Return the step folder of `path`; ValueError if there is none."""
    if (path / "state.json").is_file():
        return path
    found = completed_checkpoints(path / "checkpoint") or completed_checkpoints(path)
    if not found:
        raise ValueError(f"{path}: not a complete checkpoint (step-N) or a run folder with one")
    return found[-1]


def convert(checkpoint: Path, out: Path, dtype: str | None = None) -> list[str]:
    """Write `checkpoint` to `out`, as the export at the end of its run; return the lines to print.

    dtype: of EXPORT_DTYPES; None for that of the run.
    """
    step_folder = find_checkpoint(checkpoint)
    state = read_state(step_folder)
    args = ModelArgs.from_dict(state["model"])
    tensors = whole_tensors(step_folder, state, args)
    tokenizer_path = Path(state["tokenizer_path"])
    if not tokenizer_path.is_dir():
        raise ValueError(f"{tokenizer_path}: the tokenizer folder of the run does not exist; restore it")
    name = dtype or state.get("export_dtype", "float32")
    # convert_from_hf.py records no template and no eos_token.
    kept = {key: state[key] for key in ("token_ids", "chat_template", "eos_token", "base_path") if key in state}
    changed = save_hf_folder(args, tensors, out, dtype=EXPORT_DTYPES[name], tokenizer_path=tokenizer_path, **kept)
    return [f"{step_folder} -> {out} ({name})", *changed]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=EXPORT_DTYPES, help="[that of the run]")
    arguments = parser.parse_args(argv)
    print("\n".join(convert(arguments.checkpoint, arguments.out, arguments.dtype)))


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
