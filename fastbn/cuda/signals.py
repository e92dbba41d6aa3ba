"""How blocks of one grid tell each other something: counters, and numbers read past L1.

A counter is a word of an arithmetic array that was 0 when the kernel began. ``arrive`` releases, ``seen`` acquires; a
barrier of the block around them passes that on to its other threads (PTX memory model, causality order).
"""

from __future__ import annotations

from fastbn.cuda.driver import SIMULATED

if SIMULATED:
    from fastbn.cuda._simulated import arrive, fresh, seen
else:
    from fastbn.cuda._lowered_signals import arrive, fresh, seen

__all__ = ["arrive", "fresh", "seen"]
