"""How many threads the CPU kernels use."""

from fastbn.cpu.pool import get_num_threads, set_num_threads

__all__ = ["get_num_threads", "set_num_threads"]
