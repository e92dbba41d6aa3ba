"""Operators that only move or relabel elements: the channel axis moves with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from ..affine import ChannelAffine, follow
from ..plan import FLOATS, Refused, Step
from ..registry import Operator, Site, operator
from .shuffle import through_run

__all__ = ["Cast", "Clip", "Dropout", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]


class Relabel(Operator):
    """An operator with one data input and one output, that maps input axes to output axes."""

    upstream = downstream = "carries"
    reshapes = False
    """Whether axes come or go: a map that is the same for all channels may then lie along any of the others."""

    def pull(self, site: Site) -> Sequence[Step]:
        """From the output to the input."""
        return self._carried(site, site.input(0), self.back)

    def push(self, site: Site) -> Sequence[Step]:
        """From the input to the output."""
        if site.index != 0:
            raise Refused(f"the map feeds a parameter of {site.node.op_type}")
        return self._carried(site, site.node.outputs[0], self.forth)

    def _carried(self, site: Site, value: ir.Value, follow: Callable[[Site], ChannelAffine]) -> list[Step]:
        """The map where it is followed to, and a uniform one along the other axes of known size."""
        anywhere = _anywhere(site, value) if self.reshapes and site.affine.is_uniform else []
        try:
            followed = [follow(site)]
        except Refused:
            if not anywhere:
                raise
            followed = []
        others = [a for a in anywhere if all(a.axis != f.axis for f in followed)]
        return [Step.carry((value, a)) for a in (*followed, *others)]

    def back(self, site: Site) -> ChannelAffine:
        """The map on the input that the map on the output comes from."""
        return site.affine

    def forth(self, site: Site) -> ChannelAffine:
        """The map on the output that the map on the input becomes."""
        return site.affine


def _anywhere(site: Site, value: ir.Value) -> list[ChannelAffine]:
    """A uniform map along each axis of `value` whose size is known."""
    a, dims = site.affine, site.facts.dims(value) or ()
    sizes = [(axis, d) for axis, d in enumerate(dims) if isinstance(d, int) and d > 0]
    return [ChannelAffine.of(a.scale[0], a.shift[0], axis, d) for axis, d in sizes] if a.size else []


@operator("Identity")
class Identity(Relabel):
    """Nothing happens."""


@operator("Dropout")
class Dropout(Relabel):
    """Inference only; the mask does not depend on the data."""

    upstream = downstream = "carries in inference (no training_mode, is_test before opset 7)"

    def back(self, site: Site) -> ChannelAffine:
        """Unchanged."""
        if site.index != 0:
            raise Refused("the map stands on the mask of a Dropout")
        if site.opset < 7 and not site.int("is_test", 0):
            raise Refused("Dropout is in training form")
        if site.has(2) and bool(site.constant(2, "training_mode").any()):
            raise Refused("Dropout is in training form")
        return site.affine

    def forth(self, site: Site) -> ChannelAffine:
        """Unchanged."""
        return self.back(site)


@operator("Clip")
class Clip(Relabel):
    """Without bounds, as some exporters leave it."""

    upstream = downstream = "carries where it has no bounds"

    def back(self, site: Site) -> ChannelAffine:
        """Unchanged."""
        if any(site.has(i) for i in (1, 2)) or any(name in site.node.attributes for name in ("min", "max")):
            raise Refused("Clip is not linear: no map passes its bounds")
        return site.affine

    def forth(self, site: Site) -> ChannelAffine:
        """Unchanged."""
        return self.back(site)


@operator("Cast", "CastLike")
class Cast(Relabel):
    """Between floating types; each side then works in its own precision, as before."""

    upstream = downstream = "carries between float16, bfloat16, float32 and float64"

    def back(self, site: Site) -> ChannelAffine:
        """Unchanged."""
        site.dtype(site.input(0))
        to = site.facts.dtype(site.input(1)) if site.node.op_type == "CastLike" else ir.DataType(site.int("to", 0))
        if to not in FLOATS:
            raise Refused(f"{site.node.op_type} does not deliver a floating type")
        return site.affine

    def forth(self, site: Site) -> ChannelAffine:
        """Unchanged."""
        return self.back(site)


@operator("Transpose")
class Transpose(Relabel):
    """Output axis i is input axis perm[i]."""

    upstream = downstream = "carries; the axis is permuted"

    def _perm(self, site: Site) -> list[int]:
        perm = site.ints("perm")
        return perm if perm is not None else list(range(site.rank(site.input(0))))[::-1]

    def back(self, site: Site) -> ChannelAffine:
        """The axis that was moved here."""
        perm = self._perm(site)
        if site.affine.axis >= len(perm):
            raise Refused("the map's axis is not one of the Transpose")
        return site.affine.at(perm[site.affine.axis])

    def forth(self, site: Site) -> ChannelAffine:
        """Where the axis is moved to."""
        perm = self._perm(site)
        if site.affine.axis not in perm:
            raise Refused("the map's axis is not one of the Transpose")
        return site.affine.at(perm.index(site.affine.axis))


@operator("Reshape", "Flatten")
class Reshape(Relabel):
    """The axis is followed by the number of elements before and behind it."""

    reshapes = True
    upstream = "carries where the map is still one along a single axis, here or behind a run that shuffles channels"
    downstream = "carries where the map is still one along a single axis (split, merged with whole blocks)"

    def pull(self, site: Site) -> Sequence[Step]:
        """Follow the axis, or the whole run of reshapes and transpositions that shuffles the channels."""
        try:
            return super().pull(site)
        except Refused:
            run = through_run(site)
            if run is None:
                raise
            value, affine, reader = run
            return [Step([], [(value, affine)], reader=reader)]

    def back(self, site: Site) -> ChannelAffine:
        """Follow the axis from the output to the input."""
        return self._follow(site, site.node.outputs[0], site.input(0))

    def forth(self, site: Site) -> ChannelAffine:
        """Follow the axis from the input to the output."""
        return self._follow(site, site.input(0), site.node.outputs[0])

    def _follow(self, site: Site, source: ir.Value, target: ir.Value) -> ChannelAffine:
        here, there = site.dims(source), site.dims(target)
        if site.affine.axis >= len(here):
            raise Refused(f"the map's axis is not one of the {site.node.op_type}")
        found = follow(site.affine, here, there)
        if found is None:
            shapes = " -> ".join(str(list(site.dims(v))) for v in (site.input(0), site.node.outputs[0]))
            raise site.unknown(f"the channels cannot be followed through {site.node.op_type} {shapes}")
        return found


def _axes(site: Site, rank: int) -> list[int] | None:
    axes = site.ints("axes", 1)
    return None if axes is None else sorted(a % rank for a in axes)


@operator("Unsqueeze")
class Unsqueeze(Relabel):
    """Adds axes of size one."""

    reshapes = True
    upstream = downstream = "carries; the axis is counted anew"

    def _kept(self, site: Site) -> list[int]:
        rank = site.rank(site.input(0))
        count = len(site.ints("axes", 1) or ())
        added = _axes(site, rank + count) or []
        return [i for i in range(rank + count) if i not in added]

    def back(self, site: Site) -> ChannelAffine:
        """Count the axes that were there before."""
        kept = self._kept(site)
        if site.affine.axis in kept:
            return site.affine.at(kept.index(site.affine.axis))
        raise Refused("the map lies along the axis that Unsqueeze adds")

    def forth(self, site: Site) -> ChannelAffine:
        """The place of the axis among the new ones."""
        kept = self._kept(site)
        if site.affine.axis >= len(kept):
            raise Refused("the map's axis is not one of the Unsqueeze")
        return site.affine.at(kept[site.affine.axis])


@operator("Squeeze")
class Squeeze(Relabel):
    """Removes axes of size one."""

    reshapes = True
    upstream = downstream = "carries; the axis is counted anew"

    def _kept(self, site: Site) -> list[int]:
        dims = site.dims(site.input(0))
        gone = _axes(site, len(dims))
        if gone is None:
            if not all(isinstance(d, int) for d in dims):
                raise Refused("Squeeze without axes, of unknown dimensions")
            gone = [i for i, d in enumerate(dims) if d == 1]
        return [i for i in range(len(dims)) if i not in gone]

    def back(self, site: Site) -> ChannelAffine:
        """The place of the axis before."""
        kept = self._kept(site)
        if site.affine.axis >= len(kept):
            raise Refused("the map's axis is not one of the Squeeze")
        return site.affine.at(kept[site.affine.axis])

    def forth(self, site: Site) -> ChannelAffine:
        """The place of the axis among those that stay."""
        kept = self._kept(site)
        if site.affine.axis not in kept:
            raise Refused("the map lies along the axis that Squeeze removes")
        return site.affine.at(kept.index(site.affine.axis))
