"""How much memory tensors take at most while a piece of code runs: for tests that promise bounds."""

from mmtp.nn.memory import PeakMemory

__all__ = ["PeakMemory"]
