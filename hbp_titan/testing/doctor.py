"""`hbp-titan doctor`: is this machine, or this cluster, ready for a run? One table with advice.

    hbp-titan doctor                                       this machine; the planner alone needs no torch
    hbp-titan doctor --folder /shared/outputs --json       the folder that runs will write to; JSON
    python -m hbp_titan.launch --nnodes 4 --rdzv-backend c10d --rdzv-endpoint node0:29500 \\
        -m hbp_titan doctor --folder /shared/outputs       on each of 4 nodes: also versions, clocks, the folder

Verdicts: ok; warn, a run may be slow or fail; fail, it will fail. The exit code is 1 if any check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hbp_titan.errors import format_error
from hbp_titan.testing import machine_checks
from hbp_titan.testing.machine_checks import Check, verdict_of
from hbp_titan.utils import first_n

RENDEZVOUS_SECONDS = 120
# A network file system may show another node's new file late.
VISIBLE_SECONDS = 10.0
MAX_CLOCK_SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class Row:
    """A check of the table with the nodes that it holds for; empty: all nodes."""

    check: Check
    nodes: tuple[str, ...] = ()


def checks_of_machine(folder: Path) -> list[Check]:
    """Return all checks of this machine; a check that cannot run is a warning with its error."""
    num_gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    functions: tuple[Callable[[], list[Check]], ...] = (
        machine_checks.versions,
        machine_checks.packages,
        machine_checks.torch_and_gpus,
        machine_checks.compiler,
        lambda: machine_checks.processors(num_gpus),
        lambda: machine_checks.memory(num_gpus),
        machine_checks.shared_memory,
        machine_checks.limits,
        machine_checks.network,
        lambda: machine_checks.folder(folder),
        machine_checks.environment,
    )
    checks = []
    for function in functions:
        try:
            checks += function()
        # A machine in trouble can make any of them fail, and the others then matter more.
        except Exception as error:
            name = getattr(function, "__name__", "check").strip("<>")
            checks.append(Check(name, "warn", f"cannot check: {type(error).__name__}: {format_error(error)}"))
    return checks


def merge_nodes(of_node: dict[str, list[Check]]) -> list[Row]:
    """Return the rows of several nodes: one for all nodes that found the same, and versions must be the same."""
    rows: dict[Check, list[str]] = {}
    for node, checks in of_node.items():
        for check in checks:
            rows.setdefault(check, []).append(node)
    # The first node's order; what only others found comes with the check of that name.
    names = list(dict.fromkeys(check.name for check in rows))
    ordered = sorted(rows, key=lambda check: names.index(check.name))
    merged = [Row(check, () if len(rows[check]) == len(of_node) else tuple(rows[check])) for check in ordered]
    different = sum(row.check.name == "versions" for row in merged)
    if different > 1:
        found = f"{different} different sets on {len(of_node)} nodes"
        merged.append(Row(Check("same versions", "fail", found, "install the same versions on every node")))
    return merged


def checks_across_nodes(folder: Path, node: str, gather: Callable[[Any], list[Any]]) -> list[Check]:
    """Return the checks of what nodes share: the run folder and the time. A collective; the same on every rank.

    gather: value -> the values of all ranks in rank order.
    """
    names = gather(node)
    # Right after a collective, so that ranks are at the same point.
    clocks = dict(zip(names, gather(time.time()), strict=True))
    # Rank 0 writes; every rank looks.
    marker = folder / f".doctor-{gather(secrets.token_hex(4))[0]}"
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text("")
    gather(None)
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (visible := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = sorted({other for other, sees in gather((node, visible)) if not sees})
    if os.environ.get("RANK", "0") == "0":
        marker.unlink()
    spread = max(clocks.values()) - min(clocks.values())
    not_shared = "put job.dump_folder and data.cache_folder on a file system that all nodes share" * bool(blind)
    return [
        verdict_of(
            "shared folder",
            f"{folder}: {f'not seen by {first_n(blind, 8)}' if blind else 'seen by all nodes'}",
            fail=not_shared,
        ),
        verdict_of(
            "clocks",
            f"{len(clocks)} node{'s' * (len(clocks) > 1)} within {spread:.1f} s",
            warn="synchronize the clocks (chrony): locks and logs compare them" * (spread > MAX_CLOCK_SKEW_SECONDS),
        ),
    ]


def diagnose(folder: Path) -> list[Row]:
    """Return the rows of this machine or, under torchrun, of all nodes; each node's first rank checks its node."""
    own = checks_of_machine(folder) if os.environ.get("LOCAL_RANK", "0") == "0" else []
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return [Row(check) for check in own]
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=RENDEZVOUS_SECONDS))

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    # Nodes of a test may have one name.
    node = f"{socket.gethostname()}:{os.environ.get('GROUP_RANK', '0')}"
    shared = checks_across_nodes(folder.absolute(), node, gather)
    of_node = {name: checks for name, checks in gather((node, own)) if checks}
    dist.destroy_process_group()
    return [*merge_nodes(of_node), *(Row(check) for check in shared)]


def table(rows: list[Row], width: int) -> str:
    """Return the rows as text of at most `width` columns: verdict, check, found; the advice below."""
    lines = []
    for row in rows:
        check = row.check
        name = check.name + (f" ({first_n(row.nodes, 3)})" if row.nodes else "")
        head = f"{check.verdict:<5} {name:<17} "
        lines += textwrap.wrap(check.found, width, initial_indent=head, subsequent_indent=" " * 24) or [head]
        if check.advice:
            lines += textwrap.wrap(check.advice, width, initial_indent=" " * 24 + "-> ", subsequent_indent=" " * 27)
    counts = {name: sum(row.check.verdict == name for row in rows) for name in ("ok", "warn", "fail")}
    return "\n".join([*lines, ", ".join(f"{count} {name}" for name, count in counts.items())])


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 if a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="folder of the runs [outputs]")
    parser.add_argument("--packages", metavar="EXTRA", help="check only that the packages of an extra are installed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.packages:
        (check,) = machine_checks.packages(options.packages)
        if check.verdict != "ok":
            print(f"error: {check.found}; {check.advice}", file=sys.stderr)
        return check.verdict != "ok"
    rows = diagnose(options.folder)
    failed = any(row.check.verdict == "fail" for row in rows)
    if os.environ.get("RANK", "0") == "0":
        if options.json:
            print(json.dumps({"checks": [{**asdict(row.check), "nodes": list(row.nodes)} for row in rows]}, indent=1))
        else:
            print(table(rows, min(120, shutil.get_terminal_size().columns)))
    return int(failed)
