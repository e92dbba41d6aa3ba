"""What all layers share: switches, the last call's saved values, state under PyTorch's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, functional
from fastbn.errors import ArgumentTypeError, ArgumentValueError

Array = npt.NDArray[Any]

COUNTER = "num_batches_tracked"


def integer(name: str, value: Any) -> int:
    """Check an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentTypeError(name, "an integer", type(value).__name__)
    if value < 1:
        raise ArgumentValueError(name, "an integer >= 1", value)
    return int(value)


def parameter_dtype(value: Any) -> np.dtype[Any]:
    """Check the dtype of parameters and statistics."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise ArgumentTypeError("dtype", "float32 or float64", repr(value)) from None
    if dtype not in (arguments.F32, arguments.F64):
        raise ArgumentTypeError("dtype", "float32 (also for half-precision inputs) or float64", dtype)
    return dtype


def axis_number(value: Any) -> int:
    """Check an axis before there is an array to check it against."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentTypeError("axis", "an integer", type(value).__name__)
    return int(value)


class Layer:
    """A normalisation with its own arrays.

    Attributes
    ----------
    training : bool
        See ``train`` and ``eval``.
    """

    arrays: ClassVar[tuple[str, ...]] = ("weight", "bias")

    weight: Array | None
    bias: Array | None
    dtype: np.dtype[Any]
    running_mean: Array | None = None
    num_batches_tracked: Any = 0  # an integer, or one per time step
    _away: bool = False  # the arrays are on a GPU

    def __init__(self) -> None:
        self.training = True
        self._saved: functional.Saved | None = None

    @property
    def saved(self) -> functional.Saved:
        """What the last call saved for ``backward``: its statistics, among others."""
        if self._saved is None:
            raise ArgumentValueError("backward", "a call of the layer before it", "none")
        return self._saved

    def backward(self, grad_output: Any, *, out: Any = None) -> functional.Gradients:
        """Gradients of the last call; see ``fastbn.backward``."""
        return functional.backward(grad_output, self.saved, out=out)

    def train(self, mode: bool = True) -> Self:
        """Normalise by batch statistics and move the running ones, if any; returns self."""
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Normalise by the running statistics, if any; returns self."""
        return self.train(False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what the last call saved: a copy or a pickle is the layer, not its last batch."""
        return self.__dict__ | {"_saved": None}

    def _follow(self, x: Any) -> None:
        """Keep the layer's arrays where x is: on its GPU, or on the host."""
        if type(x) is np.ndarray and not self._away:
            return
        from fastbn import device

        device.follow(self, x)
        self._away = dispatch.on_device(x)

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and statistics under PyTorch's keys; absent ones are left out."""
        state = {key: _copied(value) for key in self.arrays if (value := getattr(self, key)) is not None}
        if self.running_mean is not None:
            state[COUNTER] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the values of a state dict into the layer's arrays: keys and shapes must fit, dtypes are cast.

        All or nothing. The arrays stay the same objects, so that an optimizer which holds them goes on with them; only
        read-only ones, and those on a GPU, are replaced.

        Parameters
        ----------
        state : mapping of str to array
            As ``state_dict`` returns it, or PyTorch's, of any dtype and device; ``num_batches_tracked`` may be absent
            (as in old checkpoints).

        Raises
        ------
        ValueError
            Missing or unexpected keys, other shapes, a negative count.
        TypeError
            No mapping, values that are no real numbers.
        """
        if not isinstance(state, Mapping):
            raise ArgumentTypeError("state", "a mapping of names to arrays", type(state).__name__)
        own = self.state_dict()
        missing, extra = set(own) - set(state) - {COUNTER}, set(state) - set(own)
        if missing or extra:
            raise ArgumentValueError("state", f"the keys {sorted(own)}", f"{sorted(state, key=str)}")
        values = {key: _loaded(key, state[key], like) for key, like in own.items() if key in state}
        for key, value in values.items():
            mine = getattr(self, key)
            if isinstance(mine, np.ndarray) and mine.ndim and mine.flags.writeable:
                mine[...] = value
            else:
                setattr(self, key, int(value) if value.shape == () else value)


def _copied(value: Any) -> Array:
    if not dispatch.on_device(value):
        return np.array(value)
    from fastbn import device

    copied: Array = device.host(value)
    return copied


def _of_torch(value: Any) -> Any:
    """Return a torch tensor as one that NumPy takes: on the host, without a graph, bfloat16 as float32."""
    if not arguments.is_tensor(value) or value.is_meta:  # one without data: ``_loaded`` refuses it
        return value
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() and value.itemsize < 4 else value


def _loaded(key: str, value: Any, like: Array) -> Array:
    """Check one array of a state dict and cast it."""
    kinds, expected = ("iu", "integers") if key == COUNTER else ("fiub", "real numbers")
    array = arguments.sequence(key, _of_torch(value), expected)
    if array.shape != like.shape:
        raise ArgumentValueError(key, f"shape {like.shape}", array.shape)
    if array.dtype.kind not in kinds and not arguments.is_bfloat16(array.dtype):
        raise ArgumentTypeError(key, expected, array.dtype)
    if key == COUNTER and ((array < 0) | (array > np.iinfo(np.int64).max)).any():
        raise ArgumentValueError(key, "no count below 0, nor of more than 63 bits", array)
    return np.array(array, like.dtype)
