"""What can go wrong, in three words: a wrong value, a wrong type, a device that is not there.

Every error is raised before anything is written and reads ``name: expected ..., got ...``.
"""

from __future__ import annotations

__all__ = ["ArgumentTypeError", "ArgumentValueError", "DeviceError", "FastbnError"]


class FastbnError(Exception):
    """Base of all errors that fastbn raises on purpose."""


class ArgumentValueError(FastbnError, ValueError):
    """An argument has a usable type but an unusable value or shape."""

    def __init__(self, name: str, expected: str, got: object):
        super().__init__(f"{name}: expected {expected}, got {got}")
        self.name = name


class ArgumentTypeError(FastbnError, TypeError):
    """An argument has an unusable type or dtype."""

    def __init__(self, name: str, expected: str, got: object):
        super().__init__(f"{name}: expected {expected}, got {got}")
        self.name = name


class DeviceError(FastbnError, RuntimeError):
    """The array lives on a device that this installation cannot reach."""
