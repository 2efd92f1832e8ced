"""Write an HTML page about one run or several: loss, throughput, balance of the ranks, memory.

    python scripts/report.py outputs/debug_model
    python scripts/report.py outputs/hbp outputs/flat_sorted --html compared.html
    python scripts/report.py outputs/debug_model --summary       # also as text: what the run gained

The page needs no network and no other file. The run may be in progress or killed; the page notes what its files lack.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hbp_titan.errors import exit_on_user_error
from hbp_titan.report import read_runs, report_page
from hbp_titan.report.summary import summary


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("outputs", nargs="+", type=Path, help="run folders (job.dump_folder); ratios are to the first")
    parser.add_argument("--html", type=Path, help="file of the page [report.html in the first folder]")
    parser.add_argument("--summary", action="store_true", help="print what each run gained, as at its end")
    options = parser.parse_args(argv)
    runs = read_runs(options.outputs)
    path = options.html or options.outputs[0] / "report.html"
    page = report_page(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    for run in runs:
        for sentence in run.missing:
            print(f"{run.name}: {sentence}")
        if options.summary:
            print(f"{run.name}:\n{summary(run)}")
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(exit_on_user_error(main))
