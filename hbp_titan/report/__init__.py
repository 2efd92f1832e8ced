"""The run report: one HTML page about what a run did, from the files that it left.

run_folder.py and step_log.py read a run, series.py derives from it, the *_part.py files and timeline.py say what a
section shows, page.py puts the page together. Nothing here needs torch, a GPU or the network.
"""

from hbp_titan.report.page import report_page
from hbp_titan.report.run import Run, read_runs

__all__ = ["Run", "read_runs", "report_page"]
