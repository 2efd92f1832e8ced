"""One program per peer, run by the peer's own Python: each imports its peer and torch, and nothing of hbp_titan.

__main__.py of the parent package copies this folder next to the results and runs `python -m peer_runners.run_X` there,
so that hbp_titan's own dependencies are not on the peer's path, and the results keep the code that made them.
"""
