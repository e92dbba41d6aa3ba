"""Copies from a tensor to shared memory that a thread begins and later waits for; no registers, no waiting between.

A thread's copies are grouped by ``close``; ``make_await(n)`` gives a function that waits for all but its last n groups.
What has arrived is seen by the thread that began it, by others behind a barrier. Who copies a share at once does so in
``PARTS`` groups, and works on the first while the others are on their way.
"""

from __future__ import annotations

from fastbn.cuda.driver import SIMULATED

if SIMULATED:
    from fastbn.cuda._simulated import close, fetch, make_await
else:
    from fastbn.cuda._lowered_fetch import close, fetch, make_await

__all__ = ["PARTS", "close", "fetch", "make_await", "none_left", "one_left", "three_left", "two_left"]

PARTS = 4
three_left, two_left, one_left, none_left = (make_await(n) for n in (3, 2, 1, 0))
