"""Pad: the value that is written around the data must map along."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ..affine import Array
from ..plan import Edit, Refused, SetAttribute, SetConstant, Step
from ..registry import Operator, Site, operator

__all__ = ["Pad"]


@operator("Pad")
class Pad(Operator):
    """Constant padding carries a map that gives all padded channels one value; reflect, edge and wrap carry any."""

    upstream = "carries; the channels must not be padded, and scale*value + shift must be one value"
    downstream = "carries; the channels must not be padded, and (value - shift)/scale must be one value"

    def pull(self, site: Site) -> Sequence[Step]:
        """The new value is the image of the old one."""
        a = site.affine
        with np.errstate(all="ignore"):
            return self._carry(site, site.input(0), lambda v: a.scale * v + a.shift)

    def push(self, site: Site) -> Sequence[Step]:
        """The new value is the one whose image the old one is."""
        if site.index != 0:
            raise Refused("the map feeds a parameter of Pad")
        a = site.affine
        with np.errstate(all="ignore"):
            return self._carry(site, site.node.outputs[0], lambda v: (v - a.shift) / a.scale)

    def _carry(self, site: Site, onward: ir.Value, image: Callable[[float], Array]) -> Sequence[Step]:
        if not self._pads_anything(site):
            return [Step.carry((onward, site.affine))]
        if site.text("mode", "constant") != "constant":
            return [Step.carry((onward, site.affine))]
        by_input = site.opset >= 11
        value = float(site.constant(2, "value").reshape(())) if by_input and site.has(2) else site.float("value", 0.0)
        new = image(value)
        unchanged = np.all(new == value)  # infinity too, which a positive scale keeps
        if not (unchanged or np.all(np.isfinite(new))) or np.any(new != new[:1]):
            raise Refused("the padded value would differ between channels")
        edits: list[Edit] = []
        if not unchanged:
            if by_input:
                dtype = site.dtype(site.input(0))
                edits.append(SetConstant(site.node, 2, lambda: np.asarray(new[0]), dtype, None, "value"))
            else:
                edits.append(SetAttribute(site.node, ir.AttrFloat32("value", float(new[0]))))
        return [Step.carry((onward, site.affine), edits=edits)]

    def _pads_anything(self, site: Site) -> bool:
        """Whether any axis grows; refuses when it is the channel axis or when that is unknown."""
        rank = site.rank(site.input(0))
        pads = site.ints("pads", 1) or site.ints("paddings") or []
        axes = site.ints("axes", 3)
        axes = list(range(rank)) if axes is None else [x % rank for x in axes]
        if len(pads) != 2 * len(axes):
            raise Refused("the pads of Pad do not match its axes")
        for k, axis in enumerate(axes):
            if axis == site.affine.axis and (pads[k] or pads[k + len(axes)]):
                raise Refused("Pad pads the channel axis")
        return any(p > 0 for p in pads)
