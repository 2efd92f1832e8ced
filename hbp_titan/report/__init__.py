"""The run report: one HTML page about one or several runs, from their run folders; without torch, GPU or network.

run.py reads a run folder and series.py derives series from it; gains.py, curriculum.py, learning.py, balance.py and
experts.py are the sections, page.py assembles the page. plan_page.py is the page about a plan, timeline.py the picture
of ranks over time, summary.py what a finished run prints.
"""

from hbp_titan.report.page import report_page
from hbp_titan.report.run import Run, read_runs

__all__ = ["Run", "read_runs", "report_page"]
