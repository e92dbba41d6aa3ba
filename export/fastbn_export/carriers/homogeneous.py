"""Piecewise linear functions through zero: ``f(s x) = s f(x)`` for s >= 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..plan import Refused, Step
from ..registry import Operator, Site, operator

__all__ = ["Homogeneous", "Negate"]


@operator("Relu", "LeakyRelu", "PRelu", "Abs")
class Homogeneous(Operator):
    """A scale that is nowhere negative passes, a shift never does."""

    upstream = downstream = "carries a scale that is nowhere negative, without shift"

    def _check(self, site: Site) -> None:
        if site.affine.has_shift:
            raise Refused(f"a shift does not pass {site.node.op_type}")
        if np.any(site.affine.scale < 0):
            raise Refused(f"a negative scale does not pass {site.node.op_type}")

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale before instead of after."""
        self._check(site)
        return [Step.carry((site.input(0), site.affine))]

    def push(self, site: Site) -> Sequence[Step]:
        """Scale after instead of before."""
        if site.index != 0:
            raise Refused(f"the map feeds a parameter of {site.node.op_type}")
        self._check(site)
        return [Step.carry((site.node.outputs[0], site.affine))]


@operator("Neg")
class Negate(Operator):
    """``s (-x) + t = -(s x - t)``."""

    upstream = downstream = "carries; the shift changes its sign"

    def pull(self, site: Site) -> Sequence[Step]:
        """Negate the shift."""
        a = site.affine
        return [Step.carry((site.input(0), type(a)(a.scale, -a.shift, a.axis)))]

    def push(self, site: Site) -> Sequence[Step]:
        """Negate the shift."""
        a = site.affine
        return [Step.carry((site.node.outputs[0], type(a)(a.scale, -a.shift, a.axis)))]
