# mypy: ignore-errors
"""Which lines the channels-first kernels ask for ahead of where they read."""

from __future__ import annotations

from fastbn.cpu import tuning
from fastbn.cpu._jit import part
from fastbn.cpu.simd import ask, lanes

SHORT, NEAR, FAR = 128, 256, 2048  # elements of a run, and how far ahead of it lines are asked for (``ahead``)
LONG, ENDLESS = 512, 1 << 14  # elements of a run between which the next sample's is asked for
AWAY = 4096  # how far ahead in longer ones: the next sample's lines would be gone before they are wanted, 1.1-1.2x


@part
def ahead(n, step, more):
    """How many elements ahead lines are asked for into the second cache, for runs of n elements.

    ``step`` elements further on lies the run that is summed after this one's neighbours, if there is ``more``. Blocks
    in the core's own cache ask for that, or for nothing: gradients 0.84-0.97 of the time. Rejected there: one line of
    four, the CPU itself reads the others ahead: 0.92-0.98 up to 26 MB, 1.06-1.15 above.

    Backward, S = 784: 2.25 copies instead of 2.35; S = 196: 2.5 instead of 2.85; S = 49: 3.2 instead of 3.5, training
    1.65 instead of 1.85. Rejected: into the first cache, no gain; 1024 for long runs, 2.5; FAR for S = 196, 2.9; NEAR
    for S = 49, 4.6; 512 for half types, float16 training 1.15x the time.
    """
    if tuning.CORE_CACHE:
        if n > ENDLESS:
            return AWAY
        return step if more and n >= LONG else 0
    return NEAR if n >= SHORT else FAR


@part
def ask_two(x, g, i):
    """Ask for a line of each tensor."""
    ask(x, i)
    ask(g, i)


@part
def ask_four(x, i):
    """Ask for the lines of four vectors."""
    W = lanes(x)
    ask(x, i)
    ask(x, i + W)
    ask(x, i + 2 * W)
    ask(x, i + 3 * W)
