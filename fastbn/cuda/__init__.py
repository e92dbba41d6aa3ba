"""GPU kernels in Python (numba.cuda), the twin of ``fastbn.cpu``. Imported only when a device array is seen."""
