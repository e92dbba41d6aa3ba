"""Operators that choose or average between branches: a map of the result is the same map of every branch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..literals import spread
from ..plan import Edit, Refused, Step
from ..registry import Operator, Site, operator

__all__ = ["Extreme", "Mean", "Where"]


class Choice(Operator):
    """Every operand from `first` on takes the whole map."""

    first = 0

    def pull(self, site: Site) -> Sequence[Step]:
        """All branches, or none."""
        onward, edits = [], list[Edit]()
        for i in range(self.first, len(site.node.inputs)):
            literal = spread(site, i, site.affine)
            if literal is None:
                onward.append((site.input(i), site.affine.at(site.operand_axis(i))))
            else:
                edits += literal
        return [Step(edits, onward, not onward)]


@operator("Where")
class Where(Choice):
    """The condition says which branch, not what its values are."""

    upstream = "carries: both branches take the map, all or none"
    first = 1


@operator("Mean")
class Mean(Choice):
    """``s mean(x, y) + t = mean(s x + t, s y + t)``."""

    upstream = "carries: all branches take the map, all or none"


@operator("Max", "Min")
class Extreme(Choice):
    """Increasing maps commute with the largest and the smallest."""

    upstream = "carries where no scale is negative: all branches take the map, all or none"

    def pull(self, site: Site) -> Sequence[Step]:
        """Refuse what turns the largest into the smallest."""
        if np.any(site.affine.scale < 0):
            raise Refused(f"a negative scale does not pass {site.node.op_type}")
        return super().pull(site)
