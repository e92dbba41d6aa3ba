"""How blocks of one grid tell each other numbers: two at a time, each 32 bits of them beside a tag in the same word.

Who waits for numbers asks for them until all tags are those of the turn: one store and one load, in no order with
other accesses. A counter costs a fence before it (all that the thread has stored must have arrived), an atomic
addition, loads of the counter, a barrier of the block, and then the loads of the numbers. NCCL's LL protocol does the
same. The memory was 0 when the kernel began, or before a barrier of the grid; tags are not 0.
"""

from __future__ import annotations

from fastbn.cuda.driver import SIMULATED, device

if SIMULATED:
    from fastbn.cuda._simulated import hear, say, ticket
else:
    from fastbn.cuda._lowered_signals import hear, say, ticket

__all__ = ["SAID", "heard", "say", "ticket"]

SAID = 4  # numbers of memory that two numbers with their tags take; it begins at a multiple of them


@device
def heard(array, index, tag):  # type: ignore[no-untyped-def]
    """Wait for two numbers."""
    there, a, b = hear(array, index, tag)
    while not there:
        there, a, b = hear(array, index, tag)
    return a, b
