"""The dry run: a configuration tried for N ranks in one CPU process, before there are N GPUs (docs/dry_run.md).

Whatever a start does up to the point of storage is done here by the same code; memory and time come from the estimates
of selection/ and simulation/.
"""
