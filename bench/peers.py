"""The libraries that are measured, each behind one function: case data -> call, with the result in ``data.out``.

A peer raises ``Unsupported`` for what it does not offer. Everyone writes into a given output where his library can.
Each peer runs in a process of its own (``worker``): two OpenMP runtimes in one process spoil both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench import family, masks
from bench.cases import MASKS, NORMS
from bench.data import Data

Call = Callable[[], object]
Prepare = Callable[[Data], Call]
OTHERS: dict[str, Any] = dict.fromkeys(NORMS, family) | dict.fromkeys(MASKS, masks)  # operations with their modules


class Unsupported(Exception):
    """Raised where a library has no such operation or dtype."""


def fastbn(data: Data) -> Call:
    """Ours, through the public functions."""
    import fastbn as f

    d, op = data, data.case.op
    if op in OTHERS:
        own: Call = OTHERS[op].fastbn(data)
        return own
    x, weight, bias, mean, var, axis, out = d.x, d.weight, d.bias, d.mean, d.var, d.axis, d.out
    if op == "infer":
        return lambda: f.batch_norm_infer(x, mean, var, weight, bias, axis=axis, out=out)
    rm, rv = mean.copy(), var.copy()
    if op == "train":
        return lambda: f.batch_norm_train(x, weight, bias, rm, rv, axis=axis, out=out)
    relu = {"activation": "relu", "residual": d.residual} if op.endswith("_fused") else {}
    if op == "train_fused":
        return lambda: f.batch_norm_train(x, weight, bias, rm, rv, axis=axis, out=out, **relu)
    _, saved = f.batch_norm_train(x, weight, bias, axis=axis, out=d.out2, **relu)
    grad = d.grad
    return lambda: f.backward(grad, saved, out=out)


def fastbn_fresh(data: Data) -> Call:
    """Ours as most people call it: without ``out=``, from arrays that NumPy allocated; the last result lives on."""
    import fastbn as f

    d, op = data, data.case.op
    if op not in ("infer", "train", "backward"):
        raise Unsupported(op)
    x, grad, weight, bias, axis = np.array(d.x, order="K"), np.array(d.grad, order="K"), d.weight, d.bias, d.axis
    if op == "infer":
        return lambda: keep_output(d, f.batch_norm_infer(x, d.mean, d.var, weight, bias, axis=axis))
    if op == "train":
        return lambda: keep_output(d, f.batch_norm_train(x, weight, bias, axis=axis)[0])
    saved = f.batch_norm_train(x, weight, bias, axis=axis)[1]
    return lambda: keep_output(d, f.backward(grad, saved).input)


def copy(data: Data) -> Call:
    """A streaming copy of the tensor: the yardstick."""
    from bench.copying import stream_copy

    source, target = (a.reshape(-1).view(np.uint8).view(np.float32) for a in (data.x, data.out))
    return lambda: stream_copy(source, target)


def torch(data: Data) -> Call:
    """PyTorch eager, through the native operators that take an output."""
    import torch as t

    d, op = data, data.case.op
    if op in OTHERS:
        theirs: Call = OTHERS[op].torch(data)
        return theirs
    x, grad, residual, out, out2 = (_tensor(a, d) for a in (d.x, d.grad, d.residual, d.out, d.out2))
    w, b, m, v = (t.from_numpy(a.copy()) for a in (d.weight, d.bias, d.mean, d.var))
    save = (t.empty(w.numel(), dtype=w.dtype), t.empty(w.numel(), dtype=w.dtype))
    native = t.ops.aten.native_batch_norm

    def forward(training: bool) -> Any:
        return native.out(x, w, b, m, v, training, 0.1, 1e-5, out=out, save_mean=save[0], save_invstd=save[1])

    if op == "infer":
        return lambda: forward(False)
    if op == "train":
        return lambda: forward(True)
    if op == "train_fused":
        return lambda: (forward(True), out.add_(residual), out.relu_())
    forward(True)
    mask = [True, True, True]

    def backward(g: Any) -> Any:
        result = t.ops.aten.native_batch_norm_backward.out(
            g, x, w, None, None, *save, True, 1e-5, mask, out0=out2, out1=gw, out2=gb
        )
        return result

    gw, gb = t.empty_like(w), t.empty_like(b)
    if op == "backward":
        d.out = d.out2
        return lambda: backward(grad)
    y = t.relu(out + residual)
    gated = t.empty_like(grad)
    d.out = d.out2
    return lambda: backward(t.ops.aten.threshold_backward.grad_input(grad, y, 0.0, grad_input=gated))


def _tensor(a: Any, data: Data) -> Any:
    import torch as t

    half = data.case.dtype == "bfloat16"
    tensor = t.from_numpy(a.view(np.uint16)).view(t.bfloat16) if half else t.from_numpy(a)
    if data.axis != 1 and tensor.ndim == 3:  # PyTorch leaves a (B, T, C) output as it was; as rows it is fastest
        return tensor.flatten(0, 1)
    if data.axis != 1 and tensor.ndim > 2:
        tensor = tensor.movedim(-1, 1)
    return tensor


def torch_compiled(data: Data) -> Call:
    """The same through torch.compile (functional: its output is fresh)."""
    import torch as t
    from torch.nn import functional

    d, op = data, data.case.op
    x, residual = _tensor(d.x, d), _tensor(d.residual, d)
    w, b, m, v = (t.from_numpy(a.copy()) for a in (d.weight, d.bias, d.mean, d.var))
    if op not in ("train", "infer", "train_fused"):
        raise Unsupported(op)

    def function(x: Any, residual: Any) -> Any:
        y = functional.batch_norm(x, m, v, w, b, op != "infer", 0.1, 1e-5)
        return t.relu(y + residual) if op.endswith("fused") else y

    compiled = t.compile(function)

    def call() -> None:
        with t.no_grad():
            keep_output(d, compiled(x, residual))

    return call


def keep_output(data: Data, tensor: Any) -> None:
    """Remember a fresh result where the check looks for it; costs nothing."""
    data.fresh = tensor  # type: ignore[attr-defined]


def onednn(data: Data) -> Call:
    """OneDNN through torch's mkldnn tensors; inference and training forward of channels-first float32."""
    import torch as t

    d, op = data, data.case.op
    if op not in ("train", "infer") or d.case.dtype != "float32" or d.case.rows:
        raise Unsupported(op)
    x = _tensor(d.x, d).to_mkldnn()
    w, b, m, v = (t.from_numpy(a.copy()) for a in (d.weight, d.bias, d.mean, d.var))

    def call() -> None:
        with t.no_grad():
            keep_output(d, t.native_batch_norm(x, w, b, m, v, op == "train", 0.1, 1e-5)[0])

    return call


def onnxruntime(data: Data) -> Call:
    """BatchNormalization in onnxruntime with bound input and output, one thread as set by the caller."""
    import os

    import onnxruntime as ort
    from onnx import helper

    d, op = data, data.case.op
    if op not in ("train", "infer") or d.case.dtype not in ("float32", "float64") or (d.case.rows and d.x.ndim > 2):
        raise Unsupported(op)
    kind = helper.np_dtype_to_tensor_dtype(d.dtype)
    names, parameters = ["w", "b", "m", "v"], (d.weight, d.bias, d.mean, d.var)
    outputs = ["y"] if op == "infer" else ["y", "rm", "rv"]
    node = helper.make_node("BatchNormalization", ["x", *names], outputs, training_mode=int(op == "train"))
    graph = helper.make_graph(
        [node], "bn", [helper.make_tensor_value_info("x", kind, d.shape)],
        [helper.make_tensor_value_info(o, kind, d.shape if o == "y" else [d.weight.size]) for o in outputs],
        [helper.make_tensor(n, kind, [a.size], a) for n, a in zip(names, parameters, strict=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", d.x)
    binding.bind_output("y", "cpu", 0, d.dtype, d.shape, d.out.ctypes.data)
    for o in outputs[1:]:
        binding.bind_output(o)
    return lambda: (session.run_with_iobinding(binding), d)  # d: the binding holds addresses only


def jax(data: Data) -> Call:
    """XLA on the CPU: training forward and inference, jitted."""
    import jax as j
    import jax.numpy as jnp

    d, op = data, data.case.op
    if op not in ("train", "infer", "train_fused") or d.case.dtype == "float64":
        raise Unsupported(op)
    shape = [1] * d.x.ndim
    shape[d.axis] = -1
    others = tuple(a for a in range(d.x.ndim) if a != d.axis)

    def function(x: Any, r: Any, w: Any, b: Any, m: Any, v: Any) -> Any:
        wide = x.astype(jnp.float32)
        if op != "infer":
            m, v = wide.mean(others), wide.var(others)
        m, v, w, b = (a.reshape(shape) for a in (m, v, w, b))
        y = (wide - m) * (w / jnp.sqrt(v + 1e-5)) + b
        if op.endswith("fused"):
            y = jnp.maximum(y + r, 0)
        return y.astype(x.dtype)

    compiled = j.jit(function)
    args = [jnp.asarray(a) for a in (d.x, d.residual, d.weight, d.bias, d.mean, d.var)]
    return lambda: keep_output(d, compiled(*args).block_until_ready())


PEERS: dict[str, Prepare] = {
    "copy": copy,
    "fastbn": fastbn,
    "fastbn_fresh": fastbn_fresh,
    "torch": torch,
    "torch_compile": torch_compiled,
    "onednn": onednn,
    "onnxruntime": onnxruntime,
    "jax": jax,
}
