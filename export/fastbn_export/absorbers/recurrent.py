"""LSTM, GRU and RNN: every gate reads ``x W' + b``, so the weights of the input take a map of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..plan import Refused, SetConstant, Step
from ..registry import Operator, Site, operator
from .common import weight_edit

__all__ = ["Recurrent"]


@operator("LSTM", "GRU", "RNN")
class Recurrent(Operator):
    """W of shape (directions, gates, input) meets x along its last axis; B holds the biases of W, then those of R."""

    downstream = "absorbs: W[:, :, i] *= scale[i], B[:, :gates] += W shift"

    def push(self, site: Site) -> Sequence[Step]:
        """Scale what each gate reads."""
        if site.index != 0:
            raise Refused(f"the map feeds a parameter of {site.node.op_type}")
        a = site.affine
        weight = site.constant(1, "weight")
        if a.axis != 2 or weight.ndim != 3 or weight.shape[2] != a.size:
            raise Refused(f"the map does not lie along the features that {site.node.op_type} reads")
        edits = weight_edit(site, 1, "weight", a.scale.reshape(1, 1, -1), (0, 1))
        if a.has_shift:
            directions, gates = weight.shape[:2]
            given = site.constant(3, "bias").astype(np.float64) if site.has(3) else np.zeros((directions, 2 * gates))
            if given.shape != (directions, 2 * gates):
                raise Refused(f"the bias of {site.node.op_type} has shape {list(given.shape)}")
            bias = given.copy()
            bias[:, :gates] += weight.astype(np.float64) @ a.shift
            edits.append(SetConstant(site.node, 3, lambda: bias, site.dtype(site.input(1)), None, "bias"))
        return [Step.absorbed(*edits)]
