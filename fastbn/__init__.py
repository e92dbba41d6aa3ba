"""fastbn: batch normalization as fast as memory allows, for NumPy arrays, in training and in inference.

>>> import numpy as np, fastbn
>>> x = np.random.default_rng(0).standard_normal((32, 64, 56, 56), dtype=np.float32)
>>> y, saved = fastbn.batch_norm_train(x)
>>> grads = fastbn.backward(np.ones_like(y), saved)
"""

from fastbn.convert import from_flax, from_keras, from_onnx
from fastbn.errors import ArgumentTypeError, ArgumentValueError, DeviceError, FastbnError
from fastbn.family import group_norm, instance_norm, layer_norm
from fastbn.functional import backward, batch_norm_infer, batch_norm_train, update_running
from fastbn.layers import BatchNorm
from fastbn.moments import Moments
from fastbn.norms import GroupNorm, InstanceNorm, LayerNorm
from fastbn.recurrent import RecurrentBatchNorm
from fastbn.renorm import renorm_bounds
from fastbn.saved import Gradients, Saved
from fastbn.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "BatchNorm",
    "DeviceError",
    "FastbnError",
    "Gradients",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Moments",
    "RecurrentBatchNorm",
    "Saved",
    "backward",
    "batch_norm_infer",
    "batch_norm_train",
    "from_flax",
    "from_keras",
    "from_onnx",
    "get_num_threads",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "renorm_bounds",
    "set_num_threads",
    "update_running",
]
