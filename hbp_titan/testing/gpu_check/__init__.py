"""One command that shows on a GPU what the tests cannot show without one (scripts/gpu_check.py)."""
