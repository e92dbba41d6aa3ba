"""What can go wrong, in three words: a wrong value, a wrong type, a device that is not there.

Every error is raised before anything is written and reads ``name: expected ..., got ...``.
"""

from __future__ import annotations

__all__ = ["ArgumentTypeError", "ArgumentValueError", "DeviceError", "FastbnError"]


class FastbnError(Exception):
    """Base of all errors that fastbn raises on purpose."""


class _ArgumentError(FastbnError):
    def __init__(self, name: str, expected: str, got: object):
        super().__init__(f"{name}: expected {expected}, got {got}")
        self.name = name
        self._parts = (name, expected, str(got))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), self._parts  # so that an error in a worker process reaches its parent


class ArgumentValueError(_ArgumentError, ValueError):
    """An argument has a usable type but an unusable value or shape."""


class ArgumentTypeError(_ArgumentError, TypeError):
    """An argument has an unusable type or dtype."""


class DeviceError(FastbnError, RuntimeError):
    """The array lives on a device that this installation cannot reach."""
