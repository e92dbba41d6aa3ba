"""From the reports of bench.gpu's jobs to its JSON and its table."""

from __future__ import annotations

from typing import Any

from bench import gpu_peers as peers
from bench import gpu_trials as trials
from bench.gpu_cases import Case

Result = dict[str, Any]
FIELDS = ("op", "layout", "dtype", "shape", "us", "floor_pct", "x_torch", "x_cudnn", "x_compile", "max_err")


def take(result: Result, job: dict[str, Any], said: dict[str, Any]) -> None:
    """Put what a job reported where it belongs; a job that failed is a row with its error, or something wrong."""
    stage, found = job["stage"], said.get("result", {})
    result["warnings"] = sorted({*result["warnings"], *said.get("warnings", ())})
    if "error" in said:
        return _failed(result, job, said["error"])
    result["wrong"] += found.get("wrong", [])
    if stage.startswith("check"):
        result["checked"] += 1
        result["worst"] = max(result["worst"], min(found.get("worst", 0.0), 1e9))  # no infinity in JSON
    elif stage == "time":
        _add(result, found)
    elif stage == "trial":
        result["trials"].append(found)
    elif stage == "time family":
        for row in found["rows"]:
            _add(result, row)
    elif stage == "compile":
        row = _row(result, job)
        if row is not None:
            row |= found
    else:  # machine, copy, launch
        result.update(found)
    return None


def _failed(result: Result, job: dict[str, Any], error: str) -> None:
    about = {key: value for key, value in job.items() if key not in ("stage", "until")}
    if job["stage"] == "time":
        row = dict(zip(Case._fields, job["case"], strict=True)) | {"kernel": "", "error": error}
        _add(result, {**dict.fromkeys((*FIELDS, "us_gpu", "us_copy", "us_split")), **row})
    elif job["stage"] in ("compile", "trial"):  # the peer's, not ours; a constant that is not in use
        result["warnings"] = [*result["warnings"], f"{job['stage']} {about}: {error}"]
    else:
        result["wrong"].append(f"{job['stage']} {about}: {error}")


def _add(result: Result, row: dict[str, Any]) -> None:
    moved, copied = row.pop("moved", None), result["copy_gb_s"]
    if moved is None:
        moved = Case(row["op"], row["layout"], row["dtype"], tuple(row["shape"])).floor_bytes
    row["floor_pct"] = 100.0 * moved / row["us"] * 1e-3 / copied if row["us"] and copied else None
    if row.get("error"):
        result["wrong"].append(f"{row['op']} {row['layout']} {row['dtype']} {row['shape']}: {row['error']}")
    result["rows"].append(row)


def _row(result: Result, job: dict[str, Any]) -> dict[str, Any] | None:
    case = [*job["case"][:3], list(job["case"][3])]
    same = (row for row in result["rows"] if [*(row[k] for k in FIELDS[:3]), list(row["shape"])] == case)
    return next(same, None)


def finish(result: Result, todo: list[dict[str, Any]]) -> None:
    """Say how much of it was done."""
    checks = sum(job["stage"].startswith("check") for job in todo)
    rows = len(
        {str([row[k] for k in FIELDS[:3]] + [*row["shape"]]) for row in result["rows"] if row["layout"] != "rows"}
    )
    result["unfinished"] = {"checks": checks - result["checked"]}
    result["unfinished"] |= {"cases": sum(job["stage"] == "time" for job in todo) - rows}


def show(result: Result) -> None:
    """Print what is wrong, then the table."""
    for name in ("wrong", "warnings"):
        for text in result[name][:40]:
            print(f"{name}: {text}")
        if len(result[name]) > 40:
            print(f"{name}: and {len(result[name]) - 40} more, in the JSON")
    for text in trials.lines(result.get("trials", [])):
        print(text)
    print(f"{'op':20s}{'layout':7s}{'dtype':9s}{'shape':22s}{'kernel':11s}{'us':>9s}{'floor':>7s}", end="")
    print(f"{'gpu us':>9s}{'copy us':>9s}{'split':>9s}{'x torch':>9s}{'x cuDNN':>9s}{'x comp.':>9s}{'error':>10s}")
    for row in result["rows"]:
        shape = "x".join(map(str, row["shape"]))
        print(f"{row['op']:20s}{row['layout']:7s}{row['dtype']:9s}{shape:22s}{row['kernel']:11s}", end="")
        print(_number(row["us"], 9, 1) + _number(row["floor_pct"], 6, 0) + "%", end="")
        print("".join(_number(row[name], 9, 2) for name in ("us_gpu", "us_copy", "us_split", *peers.PEERS)), end="")
        print(_number(row["max_err"], 10, 1, "e") if not row.get("error") else f"  {row['error'][:60]}")
    _summary(result)


def _summary(result: Result) -> None:
    copied = _number(result["copy_gb_s"], 0, 0)
    print(f"{result['machine'].get('gpu', 'unknown GPU')}, copy {copied} GB/s, launch {result['launch']}")
    print(f"versions {result['versions']}")
    print(f"kernels {result['first_contact']['compiled']}; launches by {result['first_contact']['launch']}; ", end="")
    print(f"sanitizer: {result['sanitizer']}")
    print(f"{result['checked']} checks, {len(result['wrong'])} wrong, ", end="")
    print(f"largest error {result['worst']:.2f} of what is allowed; beyond the time: {result['unfinished']}")


def _number(value: float | None, width: int, digits: int, kind: str = "f") -> str:
    return f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}{kind}}"
