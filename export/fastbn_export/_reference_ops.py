"""Operators that onnx's reference evaluator gets wrong, corrected; imported in the child process only.

`onnx.reference` runs BatchNormalization of opset 9 in training mode and cannot run opsets 7 and 8. Whether a node is
in training form is told by ``training_mode`` since opset 14, by ``is_test`` in opset 6, and by the presence of the
extra outputs in between (https://onnx.ai/onnx/operators/onnx__BatchNormalization.html).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

__all__ = ["CORRECTED"]


class BatchNormalization(OpRun):  # type: ignore[misc]
    """y = scale * (x - mean) / sqrt(var + epsilon) + B, of any opset, in the dtype of x."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, **attributes: Any) -> tuple[Any, ...]:
        epsilon = attributes.get("epsilon") or 0.0
        if self._is_training(attributes):
            return self._train(x, scale, bias, mean, var, epsilon, attributes.get("momentum", 0.9))
        return (_normalise(x, scale, bias, mean, var, epsilon),)

    def _is_training(self, attributes: dict[str, Any]) -> bool:
        opset = self.run_params["opsets"][""]
        if opset >= 14:
            return bool(attributes.get("training_mode", 0))
        if opset < 7:
            return not any(a.name == "is_test" and a.i for a in self.onnx_node.attribute)
        return sum(bool(name) for name in self.onnx_node.output) > 1

    def _train(
        self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float, momentum: float
    ) -> tuple[Any, ...]:
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        batch_mean, batch_var = x.mean(axis=axes), x.var(axis=axes)
        running = (mean * momentum + batch_mean * (1 - momentum), var * momentum + batch_var * (1 - momentum))
        results = (_normalise(x, scale, bias, batch_mean, batch_var, epsilon), *running, batch_mean, batch_var)
        return results[: len(self.onnx_node.output)]


def _normalise(x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float) -> Any:
    if mean.ndim == 1:  # per channel; otherwise spatial=0 of opsets 6 to 8: one value per activation
        shape = (1, -1) + (1,) * (x.ndim - 2) if x.ndim > 1 else (-1,)
        scale, bias, mean, var = (p.reshape(shape) for p in (scale, bias, mean, var))
    return (scale * (x - mean) / np.sqrt(var + epsilon) + bias).astype(x.dtype)


CORRECTED = [BatchNormalization]
