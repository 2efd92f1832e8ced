"""Train the same samples with hbp_titan and with other trainers; compare speed, loss, and what was trained.

    python -m hbp_titan.experiments.peers --out outputs/peers --rounds 3 \\
        --python trl=/envs/trl/bin/python --python swift=/envs/swift/bin/python

Every peer starts from the same weights and gets the same tokens and masks, with AdamW at the same constant learning
rate, for one epoch or --steps. The order rotates from round to round. A peer that trains other tokens is "not
comparable". peers.md has the peers, their environments and the conditions.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from hbp_titan.distributed.world import local_device
from hbp_titan.errors import exit_on_user_error
from hbp_titan.evaluation import perplexity
from hbp_titan.evaluation.generate import load_model
from hbp_titan.experiments.peers.audit import Recording, Samples, audit
from hbp_titan.experiments.peers.normalization import check
from hbp_titan.experiments.peers.peers import DEFAULT_PEERS, OURS, PEERS, Launcher, parse_peers, parse_pythons
from hbp_titan.experiments.peers.prepare import TINY, Inputs, prepare
from hbp_titan.experiments.peers.report import WARM_UP, Outcome, as_json, table, versions_line
from hbp_titan.experiments.peers.runners.protocol import Request


def main(argv: list[str] | None = None) -> None:
    """Run every peer in every round; print and write the table."""
    options = _options(argv)
    names, pythons = parse_peers(options.peers), parse_pythons(options.python)
    device = local_device()
    multiple = options.nproc * options.micro_batch_rows
    inputs = prepare(
        options.out, options.model, options.data, options.held_out, options.max_tokens, options.samples, multiple,
        options.seed,
    )  # fmt: skip
    total, count = sum(inputs.lengths), len(inputs.lengths)
    print(
        f"{count:,} samples, {total:,} tokens; left out: {inputs.left_out or 'none'}; device {device.type}", flush=True
    )
    threads = options.threads or max((os.cpu_count() or 1) // options.nproc, 1)
    launcher = Launcher(options.out, options.nproc, pythons, threads, options.timeout)
    launcher.copy_runners()
    samples = Samples([json.loads(line) for line in inputs.train.read_text(encoding="utf-8").splitlines()])
    outcomes = [Outcome(name, PEERS[name].note) for name in names]
    for number in range(options.rounds):
        # Another peer is first in each round: the first one finds a cooler machine.
        first = number % len(outcomes)
        for outcome in (*outcomes[first:], *outcomes[:first]):
            if outcome.results and not outcome.ran:
                continue
            request = _request(options, inputs, outcome.name, options.out / f"round-{number}" / outcome.name, device)
            _run(outcome, launcher, request, samples, inputs, device)
        _report(options, inputs, outcomes, number + 1, device)


def _report(
    options: argparse.Namespace, inputs: Inputs, outcomes: list[Outcome], rounds: int, device: torch.device
) -> None:
    """Write and print the table, after every round."""
    whole, count, total = options.steps == 0, len(inputs.lengths), sum(inputs.lengths)
    conditions = (
        f"{count:,} samples, {total:,} tokens, at most {options.max_tokens}, {options.nproc} ranks ({device.type}), "
        f"about {options.global_batch_tokens:,} tokens per step, {rounds} rounds; speed without the first "
        f"{WARM_UP} step. {versions_line(outcomes)}"
    )
    values = {"conditions": conditions, "peers": as_json(outcomes, whole, options.max_doubled)}
    (options.out / "peers.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    text = table(outcomes, whole, options.max_doubled)
    (options.out / "peers.md").write_text(f"{text}\n\n{conditions}\n", encoding="utf-8")
    print(f"\n{text}\n\n{conditions}\nwrote {options.out / 'peers.json'}", flush=True)


def _run(
    outcome: Outcome, launcher: Launcher, request: Request, samples: Samples, inputs: Inputs, device: torch.device
) -> None:
    """Run one peer in one round, audit it, and evaluate its weights."""
    result = launcher.run(PEERS[outcome.name], request)
    outcome.results.append(result)
    if result.status != "ok":
        print(f"{outcome.name}: {result.status}: {result.reason}", flush=True)
        return
    recording = Recording(request.folder, samples)
    outcome.audits.append(audit(recording))
    if outcome.normalization is None and result.grad_norms and result.grad_norms[0]:
        outcome.normalization = check(recording, result.grad_norms[0], inputs.model, device, request.dtype)
    if not outcome.held_out:
        # Once: the rounds differ in time only.
        sums = perplexity.evaluate(load_model(Path(result.weights), device), inputs.held_out, request.max_tokens)
        loss, tokens = sums["all"]["all"]
        outcome.held_out.append(loss / tokens)
    if device.type == "cuda":
        # The next peer trains on the same GPU.
        torch.cuda.empty_cache()
    words = ", ".join(f"{name}: {word}" for name, word in outcome.verdicts(request.steps == 0).items())
    speed, loss = outcome.tokens_per_second()[-1], outcome.held_out[0]
    print(f"{outcome.name}: {speed:,.0f} tokens/s, held-out loss {loss:.4f}, {words}", flush=True)


def _request(options: argparse.Namespace, inputs: Inputs, name: str, folder: Path, device: torch.device) -> Request:
    peer, variant = PEERS[name], dict(PEERS[name].variant)
    if peer.environment == OURS:
        flat = f"{options.max_tokens}:{options.flat_cp_degree}"
        short = f"{options.max_tokens // 4}:1,{options.max_tokens}:{options.nproc}"
        variant["levels"] = (options.levels or short) if variant["method"] == "hbp" else flat
        variant["overrides"] = options.override
    return Request(
        peer=name,
        variant=variant,
        model=str(inputs.model.resolve()),
        train=str(inputs.train.resolve()),
        output=str(folder.resolve()),
        max_tokens=options.max_tokens,
        global_batch_tokens=options.global_batch_tokens,
        mean_tokens=sum(inputs.lengths) / len(inputs.lengths),
        num_samples=len(inputs.lengths),
        micro_batch_rows=options.micro_batch_rows,
        steps=options.steps,
        lr=options.lr,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        max_norm=1.0,
        seed=options.seed,
        device=device.type,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        # Of the first document only.
        probe_tokens=min(16, *inputs.lengths),
    )


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/peers"), help="folder of inputs, runs and results [%(default)s]")
    add("--peers", default=DEFAULT_PEERS, help=f"comma-separated, of {', '.join(PEERS)} [%(default)s]")
    add("--python", action="append", default=[], metavar="PEER=PATH", help="Python of a peer's environment [this one]")
    add("--model", default=TINY, help="HF folder, or tiny: a random 1.2M-parameter Llama [%(default)s]")
    add("--data", nargs="*", default=[], help="JSONL with messages [embedded corpus]")
    add("--held_out", nargs="*", default=[], help="JSONL with messages that nobody trains [embedded corpus]")
    add("--samples", type=int, default=300, help="taken from the data at random; 0: all [%(default)s]")
    add("--max_tokens", type=int, default=2048, help="longest sample, and length of a pack [%(default)s]")
    add("--global_batch_tokens", type=int, default=8192, help="real tokens per optimizer step [%(default)s]")
    add("--micro_batch_rows", type=int, default=4, help="rows of a padded micro-batch [%(default)s]")
    add("--levels", default="", help="of ours_hbp, as --levels of train [max_tokens/4 on 1 rank, max_tokens on all]")
    add("--flat_cp_degree", type=int, default=1, help="ranks that share a pack of ours_flat and ours_flat_sorted [1]")
    add("--override", action="append", default=[], help="of hbp_titan's configuration: --override=--compile.enable")
    add("--nproc", type=int, default=2, help="ranks of every peer [%(default)s]")
    add("--threads", type=int, default=0, help="of a rank; 0: an equal share of the cores [%(default)s]")
    add("--rounds", type=int, default=3, help="runs of each peer [%(default)s]")
    add("--steps", type=int, default=0, help="optimizer steps; 0: one epoch [%(default)s]")
    add("--lr", type=float, default=3e-3, help="learning rate, constant [%(default)s]")
    add("--seed", type=int, default=0, help="of weights, data and order [%(default)s]")
    add("--max_doubled", type=float, default=0.1, help="share of tokens that a peer may train twice [%(default)s]")
    add("--timeout", type=float, default=3600, help="seconds of one run [%(default)s]")
    options = parser.parse_args(argv)
    for name in ("max_tokens", "global_batch_tokens", "micro_batch_rows", "nproc", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    return options


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
