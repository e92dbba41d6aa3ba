"""The base of our operators for onnx's reference evaluator."""

from __future__ import annotations

from typing import Any

from onnx.reference.op_run import OpRun

__all__ = ["WithOriginal"]


class WithOriginal(OpRun):  # type: ignore[misc]
    """An operator whose unusual forms go to onnx's own implementation."""

    op_domain = ""

    def _original(self, *inputs: Any) -> tuple[Any, ...]:
        from onnx.reference.ops import load_op

        kind = load_op("", self.onnx_node.op_type, self.run_params["opsets"][""])
        return tuple(kind(self.onnx_node, self.run_params).run(*inputs))
