"""The registry and the table that is generated from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastbn_export.operator_table import rewrite
from fastbn_export.registry import Operator, operator, registered

README = Path(__file__).parents[2] / "export" / "README.md"


def test_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert rewrite(text) == text, "run: python -m fastbn_export.operator_table export/README.md"


def _overrides(rule, method):
    """Whether a rule has a method of its own; `join` answers for `pull`."""
    names = ("pull", "join") if method == "pull" else (method,)
    return any(getattr(type(rule), name) is not getattr(Operator, name) for name in names)


def test_every_rule_says_when_it_applies():
    for name, rule in registered().items():
        for method, words in (("pull", rule.upstream), ("push", rule.downstream)):
            assert bool(words) == _overrides(rule, method), (name, method)
        assert type(rule).__doc__


def test_an_operator_has_one_rule():
    assert "Conv" in registered()
    with pytest.raises(ValueError, match="op_type: expected one operator class each"):
        operator("Conv")(Operator)
