"""What bench.gpu does on the GPU, one job after another in a process of its own: check, time, compare.

A job is a dict with its ``stage`` and what it is about; ``jobs`` lists them all, ``do`` does one and returns a dict.
Nothing a job leaves behind is needed by another, so that any process can go on where one has died.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import time
import warnings
import zlib
from collections.abc import Callable
from typing import Any

from bench import gpu_family as family
from bench import gpu_peers as peers
from bench import gpu_timing as timing
from bench import gpu_trials as trials
from bench.gpu_cases import CHECKED, MOVED, Case, cases

DTYPES = ("float32", "bfloat16", "float16", "float64")
FIRST = (((2, 3, 8, 8), "NCHW"), ((3, 5, 17, 19), "NCHW"), ((64, 8), "NC"), ((16, 3, 7, 7), "NHWC"), ((64, 100), "NC"))
TIMES = ("us", "us_gpu", "us_copy", "us_split")  # a call; the GPU alone; a copy of a tensor; our other kernels
Job = dict[str, Any]


def jobs() -> list[Job]:
    """Return every job, those that matter most first within a stage."""
    found: list[Job] = [{"stage": "machine"}]
    for dtype in DTYPES:
        for shape in CHECKED:
            layouts = ("NC",) if len(shape) == 2 else ("NCHW", "NHWC") if len(shape) == 4 else ("NCHW",)
            for layout in layouts:
                for op in MOVED:
                    case = Case(op, layout, dtype, shape)
                    found += [{"stage": "check", "case": case, "split": split} for split in (False, True)]
    found += [{"stage": "check family", "number": n, "dtype": d} for n, d in family.checks()]
    found += [{"stage": "copy"}, {"stage": "launch"}]
    found += [{"stage": "trial", "number": n} for n in range(len(trials.TRIALS))]
    found += [{"stage": "time", "case": case, "split": False} for case in cases()]
    found += [{"stage": "time family", "dtype": d, "shape": s} for d, s in family.timed()]
    # Compiling takes seconds a case: the first cases matter most.
    some = [case for case in cases() if case.shape[0] in (64, 1024)]
    return [*found, *({"stage": "compile", "case": case} for case in some)]


def do(torch: Any, job: Job) -> dict[str, Any]:
    """Do a job."""
    stage, split = job["stage"], job.get("split", False)
    case = Case(*job["case"][:3], tuple(job["case"][3])) if "case" in job else None
    context = only_split() if split else contextlib.nullcontext()
    with context:
        if stage == "machine":
            return machine(torch)
        if stage == "check":
            return check(torch, case)
        if stage == "check family":
            return {"wrong": family.check(torch, job["number"], job["dtype"])}
        if stage == "copy":
            return {"copy_gb_s": timing.copy_gb_s(torch)}
        if stage == "launch":
            return {"launch": launch_cost(torch)}
        if stage == "trial":
            return trials.measure(torch, job["number"])
        if stage == "time":
            return measure(torch, case)
        if stage == "time family":
            return {"rows": family.measure(torch, job["dtype"], tuple(job["shape"]))}
        assert stage == "compile", stage
        return compiled(torch, case)


def work(torch: Any, todo: list[Job], first: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Do the jobs from the first on and tell of each; ends early where the GPU cannot be used any more."""
    for number in range(first, len(todo)):
        job = todo[number]
        if time.time() > job.get("until", math.inf):
            continue
        tell({"begun": number})
        report: dict[str, Any] = {"done": number}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            try:
                report["result"] = do(torch, job)
            except Exception as error:
                report["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        report["warnings"] = sorted({str(w.message)[:300] for w in caught if w.category is RuntimeWarning})
        alive = usable(torch, "error" in report)
        tell(report | {"usable": alive})
        if not alive:
            return


def usable(torch: Any, failed: bool = True) -> bool:
    """Tell whether the GPU still answers; an illegal address, for one, ends all further work of a process.

    Asked after every job: a peer may have broken it, too, which no report says. ``failed``: memory is given back.
    """
    try:
        torch.cuda.synchronize()
        if failed:
            torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def only_split() -> contextlib.AbstractContextManager[None]:
    """Use the split kernels alone, whatever the shape, and those with constants by block for inference."""
    off = dict.fromkeys(("PERSISTENT", "GANG", "BUNDLE", "FLAT"), False)
    return trials.changed(off | {"SMALL": 0, "AGAIN": 0, "SLAB_CHANNELS": trials.MANY})


def kernel_of(case: Case) -> str:
    """Name the kernel that ``launch`` chooses; what it chooses where one launch is not possible here, too."""
    from fastbn.cuda import flat, plan, tuning
    from fastbn.cuda.choice import one_launch
    from fastbn.cuda.driver import device_properties

    N, C, S = *case.shape[:2], math.prod(case.shape[2:])
    dims = (N * S, C, 1) if case.layout == "NHWC" else (N, C, S)
    kind = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}[case.dtype]
    if case.op != "infer":
        one = one_launch(kind, dims, True, case.fused, case.fused, case.backward, False, device_properties())
        if one is not None:
            return str(one.name)
    elif tuning.FLAT and flat.cut(dims, kind, True) is not None:
        return "flat"
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


def seed_of(case: Case) -> int:
    """Return a seed of the case's own, in every process the same."""
    return zlib.crc32(str(case).encode())


def check(torch: Any, case: Case) -> dict[str, Any]:
    """Return what is wrong with a case and its error relative to what is allowed."""
    found, same = check_case(torch, case, seed_of(case))
    name, allowed = f"{case} {kernel_of(case)}", peers.ALLOWED[case.dtype]
    wrong = [] if found <= allowed else [f"{name}: error {found:.3g}"]
    return {"wrong": wrong + ([] if same else [f"{name}: two runs differ"]), "worst": found / allowed}


def measure(torch: Any, case: Case) -> dict[str, Any]:
    """Return a row: our time and error, and the ratio of each peer's time to ours (None where there is none)."""
    row: dict[str, Any] = {**case._asdict(), "kernel": kernel_of(case)} | dict.fromkeys(TIMES)
    row |= dict.fromkeys(peers.PEERS)
    found, same = check_case(torch, case, seed_of(case))
    row["max_err"] = found if math.isfinite(found) else None
    if not (found <= peers.ALLOWED[case.dtype] and same):
        wrong = f"{row['kernel']}: " + (f"wrong, error {found:.3g}" if same else "two runs differ")
        if row["kernel"] in ("rows", "planes"):
            return row | {"error": wrong}
        with only_split():  # what it would be without that kernel
            return measure(torch, case) | {"error": wrong}
    all_buffers = [peers.buffers(torch, case, i) for i in range(timing.sets(case.floor_bytes))]
    calls = [peers.fastbn(torch, case, b) for b in all_buffers]
    row["us"], row["us_gpu"] = us, _ = timing.microseconds(torch, calls), timing.gpu_microseconds(torch, calls)
    row["us_copy"] = copy_us(torch, all_buffers[0].x)
    if row["kernel"] not in ("rows", "planes"):
        with only_split():
            row["us_split"] = timing.microseconds(torch, [peers.fastbn(torch, case, b) for b in all_buffers])
    for name in ("x_torch", "x_cudnn"):
        row[name] = ratio(torch, case, name, all_buffers, us)
    return row


_copied: dict[int, float] = {}


def copy_us(torch: Any, x: Any) -> float:
    """Return the time of a copy of a tensor, from memory to memory: what a small one can at best be done in."""
    nbytes = x.numel() * x.element_size()
    if nbytes not in _copied:
        pairs = [(x.clone(), torch.empty_like(x)) for _ in range(timing.sets(2 * nbytes))]
        _copied[nbytes] = timing.microseconds(torch, [lambda a=a, b=b: b.copy_(a) for a, b in pairs])
    return _copied[nbytes]


def compiled(torch: Any, case: Case) -> dict[str, Any]:
    """Return the time of torch.compile's kernels over ours."""
    some = [peers.buffers(torch, case, i) for i in range(timing.sets(case.floor_bytes))]
    us = timing.microseconds(torch, [peers.fastbn(torch, case, b) for b in some])
    return {"x_compile": ratio(torch, case, "x_compile", some, us)}


def ratio(torch: Any, case: Case, name: str, all_buffers: list[Any], us: float) -> float | None:
    """Return the time of a peer over ours; None where it has no such operation or fails."""

    def calls() -> list[peers.Call]:
        made = [peers.PEERS[name](torch, case, b) for b in all_buffers]
        return [call for call in made if call is not None]

    return peers.time_over(torch, calls, us, f"{name} {case}")


def launch_cost(torch: Any) -> dict[str, float | None]:
    """Return what a small call costs the host, in microseconds, ours and PyTorch's."""
    cost: dict[str, float | None] = {}
    for op in ("infer", "train", "backward"):
        case = Case(op, "NC", "float32", (64, 100))
        b = peers.buffers(torch, case, 0)
        cost[f"{op}_us"] = timing.host_microseconds(torch, peers.fastbn(torch, case, b))
        cost[f"{op}_torch_us"] = None
        with contextlib.suppress(Exception):  # not our call
            call = peers.PEERS["x_torch"](torch, case, b)
            cost[f"{op}_torch_us"] = timing.host_microseconds(torch, call)
    return cost


def small(torch: Any) -> list[str]:
    """Do a few small calls of every kernel, at the first contact and for the sanitizer; return what went wrong."""
    wrong = []
    for shape, layout in FIRST:
        for op in MOVED:
            for split in (False, True):
                job = {"stage": "check", "case": Case(op, layout, "float32", shape), "split": split}
                try:
                    wrong += do(torch, job)["wrong"]
                except Exception as error:
                    wrong.append(f"{job['case']}: {type(error).__name__}: {error}")
                    if not usable(torch):
                        return [*wrong, "the GPU cannot be used any more"]
    return wrong


def machine(torch: Any) -> dict[str, Any]:
    """Return what the numbers depend on."""
    from fastbn.cuda.driver import check as ready

    ready()
    device = torch.cuda.get_device_properties(0)
    about = {
        "gpu": device.name,
        "memory_gb": device.total_memory >> 30,
        "multiprocessors": device.multi_processor_count,
    }
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("numba", "numba-cuda", "llvmlite", "cuda-bindings", "cuda-core", "numpy", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"machine": about, "versions": found}
