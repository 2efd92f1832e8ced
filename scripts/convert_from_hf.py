"""Convert an HF folder to a checkpoint.

    python scripts/convert_from_hf.py HF_DIR OUT

OUT is an fp32 checkpoint with only the model, for checkpoint.initial_load_path: each rank reads only its own shards.
initial_load_path also accepts HF_DIR itself; converting pays off for what is loaded often.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from hbp_titan.components.checkpoint import save_model_tensors
from hbp_titan.components.dcp_storage import TORCH_DTYPES
from hbp_titan.errors import exit_on_user_error
from hbp_titan.models.decoder import Decoder
from hbp_titan.models.hf import HFTensors
from hbp_titan.models.hf_config import args_from_hf, token_ids_from_hf


def convert(hf_folder: Path, out: Path) -> int:
    """Write the weights of `hf_folder` to the checkpoint `out`; return the number of tensors."""
    args = args_from_hf(hf_folder)
    found = HFTensors(hf_folder, args)
    with torch.device("meta"):
        names = Decoder(args).state_dict().keys()
    # A tied output matrix has two names in a checkpoint and one in the folder.
    tensors = {name: found[name if name in found else "tok_embeddings.weight"].float() for name in names}
    state = {
        "model": dataclasses.asdict(args),
        "tokenizer_path": str(hf_folder),
        "token_ids": token_ids_from_hf(hf_folder),
        "base_path": str(hf_folder),
        "export_dtype": str(TORCH_DTYPES[found.dtypes[0]]).removeprefix("torch."),
    }
    save_model_tensors(out, tensors, state)
    return len(tensors)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(argv)
    count = convert(arguments.hf_folder, arguments.out)
    print(f"{arguments.hf_folder} -> {arguments.out} ({count} tensors)")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
