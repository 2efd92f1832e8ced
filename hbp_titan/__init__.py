"""hbp_titan: Hierarchical Balance Packing for long-context SFT, in native PyTorch."""

import os

__version__ = "0.2.0"

# torch's profiler, which counts memory on a CPU, writes a line on stderr at each start and stop. It reads this when
# torch is imported, so it has to be said first.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
