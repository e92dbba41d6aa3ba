"""Every number that a measurement may change."""

THREADS = 256  # threads of a block in the split kernels
DEPTH = 16  # vectors that a thread of a sums kernel reads
APPLY_DEPTH = 8  # vectors that a thread of an elementwise kernel reads
BLOCKS = 1056  # blocks from which a grid is large enough: 8 for each of 132 multiprocessors
RUN = 64  # elements of a channel's run from which the channels-first kernels win
RUNS = 8  # odd runs from which rows win: sums by column are then a small part of the traffic
FAR = 4.0  # squared distance of pivot and mean, in variances, from which a channel is summed again
TINY = 1e-30  # below this variance float32 squares may have underflowed
SLAB_CHANNELS = 96  # channels from which one block each fills the GPU
MASKED_THREADS = 512  # most threads of a block that keeps a channel under a mask: with 1024 registers would spill
SMALL = 4 << 20  # bytes of a tensor below which one launch beats three, however few multiprocessors it keeps busy
SLAB = ((6144, 1024), (2048, 512), (512, 256), (0, 128))  # (vectors of a channel, threads of its block)
SLAB_TOGETHER = 2  # blocks with 1024 threads among them that share a multiprocessor, where shared memory allows
ALONE = 8  # rows of a thread up to which a tile of rows is one block's alone
AGAIN = 1 << 14  # values of a channel up to which one block reads it again where it cannot keep it
SCATTERED = 1 << 17  # bytes of a tensor of rows up to which that pays: a channel's values lie apart
TALLY = 1 << 13  # places of a mask up to which one block counts them
RESERVE = 4096  # bytes of shared memory that a slab leaves to the kernel's own arrays
PERSISTENT_THREADS = 512  # threads of a block, one a multiprocessor, that works on rows in one launch
PERSISTENT = True  # rows in one cooperative launch; False: always in three
WARP_VECTORS = 256  # vectors of a set up to which a warp has it to itself
READ_AGAIN = 16384  # elements of a set up to which a team reads it twice where it cannot be kept
DIRECT = True  # launches by the driver's own call; False: by Numba's, which takes 20 us instead of one
