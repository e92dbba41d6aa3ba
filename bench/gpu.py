"""Check and time the kernels on the GPU of this machine: ``python -m bench.gpu [--seconds N] [--out FILE]``.

In this order: every kernel against float64 with fresh inputs and poisoned outputs; the bandwidth of a copy; our time of
every case, its floor (bytes that must move, at the bandwidth of a copy) and those of PyTorch, of cuDNN and, as far as
the time goes, of torch.compile; the cost of a launch; compute-sanitizer on a small run. A kernel that is wrong is not
timed and makes the exit status 1. Without a GPU it says so and exits with 0. Needs numpy, numba-cuda and torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import gpu_family as family
from bench import gpu_peers as peers
from bench import gpu_timing as timing
from bench.gpu_cases import CHECKED, MOVED, Case, cases

RESULTS = Path(__file__).parent / "results"
DTYPES = ("float32", "bfloat16", "float16", "float64")


def find_toolkit() -> None:
    """Tell numba-cuda where the CUDA toolkit is (libnvvm, libdevice), if the machine has one and nobody said so."""
    program = shutil.which("nvcc")
    folders = ([Path(program).resolve().parent.parent] if program else []) + [Path("/usr/local/cuda")]
    found = next((folder for folder in folders if (folder / "nvvm").is_dir()), None)
    if found is not None and not os.environ.get("CUDA_HOME") and not os.environ.get("CUDA_PATH"):
        os.environ["CUDA_HOME"] = str(found)


def missing() -> str:
    """Say what keeps this from running, or nothing."""
    try:
        import torch
    except ImportError:
        return "no GPU is present (and no torch)"
    if not torch.cuda.is_available():
        return "no GPU is present"
    find_toolkit()
    try:
        from fastbn.cuda.driver import check

        check()
    except Exception as error:
        return f"the GPU cannot be used: {error}"
    return ""


@contextlib.contextmanager
def only_split() -> Iterator[None]:
    """Use the split kernels alone, whatever the shape."""
    from fastbn.cuda import choice, tuning

    changed = {"PERSISTENT": False, "SMALL": 0, "SLAB_CHANNELS": 1 << 30}
    kept = {name: getattr(tuning, name) for name in changed}

    def put(values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(tuning, name, value)
        choice.forget()

    put(changed)
    try:
        yield
    finally:
        put(kept)


def kernel_of(case: Case) -> str:
    """Name the kernel that ``launch`` chooses."""
    from fastbn.cuda import plan
    from fastbn.cuda.driver import device_properties

    N, C = case.shape[:2]
    S = 1
    for extent in case.shape[2:]:
        S *= extent
    dims = (N * S, C, 1) if case.layout == "NHWC" else (N, C, S)
    kind = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}[case.dtype]
    tensors = 2 if case.backward else 1
    if case.op != "infer":
        if plan.slab(dims, kind, True, tensors, device_properties()[1])[0]:
            return "slab"
        if plan.persistent(dims, kind, True, tensors, *device_properties()).threads:
            return "persistent"
    return "rows" if plan.plan(dims, kind, True).rows else "planes"


def check_case(torch: Any, case: Case, seed: int) -> tuple[float, bool]:
    """Return the error of one case, and whether a second run gives the same bits."""
    b = peers.buffers(torch, case, seed)
    want = peers.reference(torch, case, b)  # before the running statistics move
    call = peers.fastbn(torch, case, b)
    call()
    wrong = peers.error(torch, case, b.out, want)
    del want
    first = b.out.clone()
    b.out.fill_(float("nan"))
    call()
    same = case.op == "infer" or bool(torch.equal(first, b.out))
    return wrong, same


def check_all(torch: Any) -> tuple[list[str], float]:
    """Check every kernel; return what is wrong and the largest error relative to what is allowed."""
    wrong, worst, seed = [], 0.0, 1
    for shape in CHECKED:
        layouts = ("NC",) if len(shape) == 2 else ("NCHW", "NHWC") if len(shape) == 4 else ("NCHW",)
        for layout in layouts:
            for dtype in DTYPES:
                for op in MOVED:
                    case = Case(op, layout, dtype, shape)
                    for split in (False, True):
                        seed += 1
                        with only_split() if split else contextlib.nullcontext():
                            found, same = check_case(torch, case, seed)
                            name = f"{case} {kernel_of(case)}"
                        worst = max(worst, found / peers.ALLOWED[dtype])
                        if not found <= peers.ALLOWED[dtype]:
                            wrong.append(f"{name}: error {found:.3g}")
                        if not same:
                            wrong.append(f"{name}: two runs differ")
    return wrong, worst


def measure(torch: Any, case: Case, names: list[str], gb_s: float) -> dict[str, Any]:
    """Return a row: our time and error, and the ratio of each peer's time to ours (None where there is none)."""
    row: dict[str, Any] = {**case._asdict(), "kernel": kernel_of(case), "us": None, "floor_pct": None}
    row |= {"us_split": None, **dict.fromkeys(peers.PEERS), "max_err": None}
    found, same = check_case(torch, case, hash(case) & 0xFFFF)
    row["max_err"] = found
    if not (found <= peers.ALLOWED[case.dtype] and same):
        return row
    all_buffers = [peers.buffers(torch, case, i) for i in range(timing.sets(case.floor_bytes))]
    row["us"] = us = timing.microseconds(torch, [peers.fastbn(torch, case, b) for b in all_buffers])
    row["floor_pct"] = 100.0 * case.floor_bytes / us * 1e-3 / gb_s
    if row["kernel"] in ("slab", "persistent"):
        with only_split():
            row["us_split"] = timing.microseconds(torch, [peers.fastbn(torch, case, b) for b in all_buffers])
    for name in names:
        row[name] = ratio(torch, case, name, all_buffers, us)
    return row


def ratio(torch: Any, case: Case, name: str, all_buffers: list[Any], us: float) -> float | None:
    """Return the time of a peer over ours; None where it has no such operation or fails."""
    try:
        calls = [peers.PEERS[name](torch, case, b) for b in all_buffers]
        ready = [call for call in calls if call is not None]
        return timing.microseconds(torch, ready) / us if ready else None
    except Exception as error:
        print(f"  {name} {case}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return None


def launch_cost(torch: Any) -> dict[str, float]:
    """Return what a small call costs the host, in microseconds, ours and PyTorch's."""
    cost = {}
    for op in ("infer", "train", "backward"):
        case = Case(op, "NC", "float32", (64, 100))
        b = peers.buffers(torch, case, 0)
        cost[f"{op}_us"] = timing.host_microseconds(torch, peers.fastbn(torch, case, b))
        call = peers.torch_native(torch, case, b)
        assert call is not None
        cost[f"{op}_torch_us"] = timing.host_microseconds(torch, call)
    return cost


def sanitize() -> str:
    """Run a few cases under compute-sanitizer, in a process of their own; say how it went."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not installed"
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "bench.gpu", "--small"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return "took too long"
    last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return last[-1].strip("= ") if last else f"failed with {done.returncode}: {done.stderr[-300:]}"


def small(torch: Any) -> None:
    """A few small calls of every kernel, for the sanitizer."""
    for shape, layout in (((2, 3, 8, 8), "NCHW"), ((3, 5, 17, 19), "NCHW"), ((64, 8), "NC"), ((16, 3, 7, 7), "NHWC")):
        for op in MOVED:
            case = Case(op, layout, "float32", shape)
            for context in (contextlib.nullcontext(), only_split()):
                with context:
                    assert check_case(torch, case, 1)[0] <= peers.ALLOWED["float32"], case


def versions(torch: Any) -> dict[str, str]:
    """Return the versions of everything that has a part in the numbers."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("numba", "numba-cuda", "numpy", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"\n{result['machine']['gpu']}, copy {result['copy_gb_s']:.0f} GB/s, launch {result['launch']}")
    print(f"{'op':15s}{'layout':7s}{'dtype':9s}{'shape':22s}{'kernel':11s}{'us':>9s}{'floor':>7s}", end="")
    print(f"{'x torch':>9s}{'x cuDNN':>9s}{'x comp.':>9s}{'error':>10s}")
    for row in result["rows"]:
        us, floor = row["us"] or float("nan"), row["floor_pct"] or float("nan")
        shape = "x".join(map(str, row["shape"]))
        print(f"{row['op']:15s}{row['layout']:7s}{row['dtype']:9s}{shape:22s}{row['kernel']:11s}", end="")
        print(f"{us:9.1f}{floor:6.0f}%", end="")
        for name in peers.PEERS:
            print(f"{row[name]:9.2f}" if row[name] is not None else f"{'-':>9s}", end="")
        print(f"{row['max_err']:10.1e}")


def run(torch: Any, seconds: float, out: Path) -> int:
    """Check, measure, write and print; return the exit status."""
    end = time.monotonic() + seconds
    device = torch.cuda.get_device_properties(0)
    machine = {
        "gpu": device.name,
        "memory_gb": device.total_memory >> 30,
        "multiprocessors": device.multi_processor_count,
    }
    result: dict[str, Any] = {"machine": machine, "versions": versions(torch)}
    wrong, worst = check_all(torch)
    wrong += family.check(torch)
    print(f"checked every kernel, {len(wrong)} wrong, largest error {worst:.2f} of what is allowed", flush=True)
    result |= {"wrong": wrong, "copy_gb_s": timing.copy_gb_s(torch), "launch": launch_cost(torch)}
    result |= {"sanitizer": sanitize(), "rows": []}
    rows: list[dict[str, Any]] = result["rows"]
    for case in cases():
        if time.monotonic() > end - 0.4 * seconds:
            break
        rows.append(measure(torch, case, ["x_torch", "x_cudnn"], result["copy_gb_s"]))
    if time.monotonic() < end - 0.3 * seconds:
        rows += family.measure(torch, result["copy_gb_s"], wrong)
    write(out, result)
    for row in rows:  # compiling takes seconds a case: the first cases matter most
        if time.monotonic() > end:
            break
        case = Case(row["op"], row["layout"], row["dtype"], tuple(row["shape"]))
        if row["us"] and case.shape[0] in (64, 1024) and row["layout"] != "rows":
            some = [peers.buffers(torch, case, i) for i in range(timing.sets(case.floor_bytes))]
            row["x_compile"] = ratio(torch, case, "x_compile", some, row["us"])
    write(out, result)
    show(result)
    unfinished = len(cases()) - sum(row["layout"] != "rows" for row in rows)
    bad = wrong + [f"{row}: not timed" for row in rows if row["us"] is None]
    print("\n".join(bad) or "every kernel is right", f"; {unfinished} cases beyond the time" if unfinished else "")
    return 1 if bad else 0


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420.0, help="time to stay within, apart from start-up")
    parser.add_argument("--out", type=Path, default=None, help="JSON (default: bench/results/<gpu>.json)")
    parser.add_argument("--small", action="store_true", help="a few small checks only")
    options = parser.parse_args()
    reason = missing()
    if reason:
        print(reason)
        return 0 if reason.startswith("no GPU") else 1
    import torch

    with torch.no_grad():
        if options.small:
            small(torch)
            return 0
        name = torch.cuda.get_device_name(0).lower().replace(" ", "-")
        return run(torch, options.seconds, options.out or RESULTS / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
