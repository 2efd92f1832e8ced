"""One HTML page about a run, or about several side by side: what was learned, how fast, and what it was waiting for.

    python scripts/report.py outputs/debug_model
    python scripts/report.py outputs/hbp outputs/flat_sorted --html compared.html

The page needs no network and no other file: it can be sent and kept. It can be made while a run goes on or after it was
killed; what its files lack is left out, and the page says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hbp_titan.errors import exit_on_user_error
from hbp_titan.report import read_runs, report_page


def main(argv: list[str] | None = None) -> None:
    """Read the folders and write the page."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("outputs", nargs="+", type=Path, help="run folders, [job] dump_folder; ratios are to the first")
    parser.add_argument("--html", type=Path, help="where the page goes [report.html in the first folder]")
    options = parser.parse_args(argv)
    runs = read_runs(options.outputs)
    path = options.html or options.outputs[0] / "report.html"
    page = report_page(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    for run in runs:
        for sentence in run.missing:
            print(f"{run.name}: {sentence}")
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
