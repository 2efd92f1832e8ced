"""Train the same samples with HBP and its baselines over several seeds; compare the loss of held-out samples.

    python scripts/quality_study.py
    python scripts/quality_study.py --variants isf,flat_sorted --seeds 1,2,3 --parallel 2
    python scripts/quality_study.py --launch torchrun --ranks 8 --folder outputs/study_8b \\
        --job.config_file train_configs/llama3_1_8b_hbp.toml --data.max_samples 20000 --data.validation_files V.jsonl

Each variant changes one setting of the default. All have the same samples to choose from, number of optimizer steps,
tokens per step, learning-rate schedule and, seed by seed, initial weights (the seed is packing.seed and training.seed).
Plans are made for --ranks; by default one process emulates them (study/single_process.py). Without a config file a
small model is trained on the embedded corpus and recall documents: up to 128 tokens first (FOLDER/base), then up to
8,192 tokens by every variant.

A run is an ordinary run in FOLDER/VARIANT/seed-N; finished ones are not repeated, so seeds and variants can be added.
Prints Markdown tables; writes study.json, tables.md and quality.svg to FOLDER. Further arguments are configuration
overrides. hbp_titan/experiments/quality.md explains the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hbp_titan.errors import exit_on_user_error
from hbp_titan.experiments.study.built_in import is_built_in, study_config, train_bases
from hbp_titan.experiments.study.quality import band_table, draw, loss_table, plan_table, recall_table, run_study
from hbp_titan.experiments.study.runs import LAUNCHES, VARIANTS, Launch, parse_variants


def main(argv: list[str] | None = None) -> None:
    variants_help = "\n".join(f"  {variant.name:12} {variant.description}" for variant in VARIANTS.values())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"variants:\n{variants_help}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # A step of levels side by side holds more tokens than the others' steps, so it would cut all runs short.
    usual = ",".join(name for name in VARIANTS if name != "parallel")
    parser.add_argument("--variants", default=usual, help="in addition to the default, comma-separated [%(default)s]")
    parser.add_argument("--seeds", default="1,2,3,4,5", help="of each variant [%(default)s]")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--ranks", type=int, default=4, help="number of ranks that plans are made for [4]")
    parser.add_argument("--launch", choices=LAUNCHES, default=LAUNCHES[0], help="how a run is started [%(default)s]")
    parser.add_argument("--folder", type=Path, default=Path("outputs/quality"), help="of the study [%(default)s]")
    options, overrides = parser.parse_known_args(argv)
    seeds = [int(word) for word in options.seeds.split(",") if word.strip().isdecimal()]
    if len(seeds) != len(options.seeds.split(",")) or len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds {options.seeds}: must be different whole numbers, comma-separated")
    if options.parallel < 1:
        raise ValueError(f"--parallel {options.parallel} must be at least 1")
    launch, variants = Launch(options.launch, options.ranks), parse_variants(options.variants)
    config = study_config(overrides, options.folder)

    def report(line: str) -> None:
        print(line, flush=True)

    if is_built_in(overrides):
        train_bases(options.folder, launch, seeds, options.parallel, report)
    study = run_study(config, options.folder, launch, variants, seeds, options.parallel, report)
    recall = [recall_table(study)] if "recall" in study["runs"][0] else []
    tables = "\n\n".join([loss_table(study), band_table(study), *recall, plan_table(study)])
    print(f"\n{tables}")
    (options.folder / "tables.md").write_text(tables + "\n", encoding="utf-8")
    if len(seeds) > 1 and len(variants) > 1:
        (options.folder / "quality.svg").write_text(draw(study), encoding="utf-8")
    print(f"\nwrote {options.folder}")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
