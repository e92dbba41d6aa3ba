"""What was folded where, what was left, and why.

Requirement: one entry for each batch normalization of the original model; plain values only, so that it is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["BnEntry", "FoldReport"]


@dataclass
class BnEntry:
    """The fate of one batch normalization.

    Attributes
    ----------
    name : str
        Name of the operator (of its output if it has none); what ``keep`` and ``skip`` match.
    kind : str
        "BatchNormalization" or "decomposed" (a run of Mul/Add/Sub/Div by constants).
    folded : bool
    absorber : list of str
        "name (op type)" of the operators that swallowed it; empty when left, or when it was the identity.
    direction : "upstream", "downstream" or None
    path : list of str
        Op types of the carriers between it and the absorbers.
    reason : str or None
        Why it was left.
    scope : str
        The function or control-flow body it stands in; "" for the main graph.
    """

    name: str
    kind: str = "BatchNormalization"
    folded: bool = False
    absorber: list[str] = field(default_factory=list)
    direction: str | None = None
    path: list[str] = field(default_factory=list)
    reason: str | None = None
    scope: str = ""

    @property
    def op_type(self) -> str:
        """Same as `kind`."""
        return self.kind


@dataclass
class FoldReport:
    """The result of a fold in numbers.

    Attributes
    ----------
    entries : list of BnEntry
        In the order of the model.
    ops_before, ops_after : dict
        Operators by type, bodies and functions included.
    parameters_before, parameters_after : int
        Elements in all constants.
    """

    entries: list[BnEntry] = field(default_factory=list)
    ops_before: Mapping[str, int] = field(default_factory=dict)
    ops_after: Mapping[str, int] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0

    @property
    def folded(self) -> int:
        """Number of entries that are gone."""
        return sum(e.folded for e in self.entries)

    @property
    def left(self) -> int:
        """Number of entries that stay."""
        return sum(not e.folded for e in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return {
            "folded": self.folded,
            "left": self.left,
            "entries": [asdict(e) for e in self.entries],
            "ops_before": dict(self.ops_before),
            "ops_after": dict(self.ops_after),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The dictionary as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)
