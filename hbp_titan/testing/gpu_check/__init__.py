"""GPU check: one command for what the tests cannot check without a GPU (scripts/gpu_check.py)."""
