"""CPU kernels in Numba, from vectors (``simd``) up to one call per operation (``launch``)."""
