"""Copies of whole runs between tensors and shared memory, which the chip does by itself (sm_90 and newer).

One thread begins a copy; no other instruction is spent on it. What is brought in counts, in bytes, towards a barrier
(one int64 in shared memory), which all threads that read it wait for. What is sent out must have been shown by those
who wrote it, and a barrier of the block must lie between.
"""

from __future__ import annotations

from fastbn.cuda.driver import SIMULATED

if SIMULATED:
    from fastbn.cuda._simulated import arrived, begin, bring, expect, send, sent, show
else:
    from fastbn.cuda._lowered_bulk import arrived, begin, bring, expect, send, sent, show

__all__ = ["arrived", "begin", "bring", "expect", "send", "sent", "show"]
