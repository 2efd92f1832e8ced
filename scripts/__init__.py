"""Command lines of hbp_titan: `python scripts/X.py` in a checkout, `hbp-titan X` where the package is installed."""
