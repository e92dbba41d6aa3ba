"""The numbers that decide which kernel runs; each with the measurement behind it (2-core AMD EPYC, Zen 4 and Zen 5)."""

PARALLEL = 1 << 19  # elements below which waking a helper (about 50 us) costs more than it brings
STREAM = 4 << 20  # bytes of output from which streaming stores pay: past that it would not stay in the cache anyway
MATRIX = 256  # columns that a short matrix row is widened to; 1024 are 1.1x slower to sum, their rows lie 4 KB apart
WIDTH = 2048  # columns of a block: its constants (28 KB) share L1 with four rows
WHOLE = 1 << 18  # elements of a tensor that is one block
TALL = 1024  # rows from which a block of columns no longer fits in the cache
BAND = (1 << 15, 1 << 20)  # elements of a band of rows: small ones cost 1.3x, a large one is what a thread may wait for
