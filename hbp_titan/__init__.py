"""hbp_titan: Hierarchical Balance Packing for long-context SFT, in native PyTorch."""

__version__ = "0.1.0"
