"""Compile every GPU kernel without a GPU and say what it became: registers, spills, 128-bit accesses, float64.

``python -m bench.gpu_compile [--write | --check] [--sm90] [PREFIX]``, or ``--store I/N [--sm80]`` to put every
N-th kernel from the I-th where ``fastbn.cuda.stored`` finds it (N processes compile N times as fast). Needs, all of
CUDA 13.0 (mixed versions fail in several ways): "numba-cuda[cu13]==0.30.4" "cuda-toolkit==13.0.*"
"nvidia-nvjitlink==13.0.*" nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm. ``--write`` replaces
bench/results/cuda_compile.json, or the rows of PREFIX in it; ``--check`` fails where a kernel spills, has lost 128-bit
accesses or gained more than 8 registers; tests/cuda/test_compile.py does so for some of them.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TABLE = Path(__file__).parent / "results" / "cuda_compile.json"
TARGETS = ((8, 0), (9, 0))
MEMORY = re.compile(r"^(LDG|STG|LDS|STS|LDL|STL)\b")
DOUBLE = re.compile(r"DADD|DMUL|DFMA|DSETP|DMNMX|F2F\.F64|I2F\.F64|MUFU\.\w+64H")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)


def tool(name: str) -> str:
    """Path of a CUDA program that came with a wheel, or its name alone."""
    found = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", name)
    return str(found) if found.exists() else name


def pretend_device(target: tuple[int, int]) -> None:
    """numba-cuda asks the current device for its compute capability as soon as a kernel calls a device function."""
    from numba.cuda import codegen, compiler, dispatcher

    device = SimpleNamespace(
        compute_capability=target, supports_float16=True, supports_bfloat16=True, id=0, name="none"
    )  # fmt: skip
    dispatcher.get_current_device = compiler.get_current_device = lambda: device
    codegen.CUDACodeLibrary._ensure_cc = lambda self, cc: target if cc is None else cc


def kernels(target: tuple[int, int] = (9, 0)) -> Iterator[tuple[str, Any]]:
    """Every kernel, by name: plain and with all there is (residual and ReLU), each dtype, each width, each block."""
    from fastbn.cuda import adjust, finalize, gang_sums, masks, sets_columns, tuning
    from fastbn.cuda.arrays import ITEMSIZE

    for kind, itemsize in ITEMSIZE.items():
        for relu, residual in ((False, False), (True, True)):
            suffix = f"{' relu' * relu}{' residual' * residual}"
            for W in (16 // itemsize, 1):
                yield from _split(kind, W, relu, residual, f"{kind} W{W}{suffix}")
            yield from _flat(kind, 16 // itemsize, relu, residual, f"{kind} W{16 // itemsize}{suffix}")
            yield from _whole(kind, 16 // itemsize, relu, residual, f"{kind} W{16 // itemsize}{suffix}", target)
        yield from _masked(kind, 16 // itemsize, target)
        yield from _sets(kind, 16 // itemsize)
        yield f"finalize {kind}: train", finalize.settle_train(kind, tuning.THREADS)
        yield f"finalize {kind}: masked train", finalize.settle_train(kind, tuning.THREADS, True)
        if kind in ("f32", "f64"):
            yield f"finalize {kind}: backward", finalize.settle_backward(kind, tuning.THREADS)
            yield f"finalize {kind}: given", finalize.settle_given(kind, tuning.THREADS)
            yield f"finalize {kind}: sets settle", sets_columns.settle(kind, tuning.THREADS)
            yield f"finalize {kind}: sets move", sets_columns.move(kind, tuning.THREADS)
            yield f"finalize {kind}: adjust move", adjust.move(kind, tuning.THREADS, False)
            yield f"finalize {kind}: adjust masked move", adjust.move(kind, tuning.THREADS, True)
            yield f"finalize {kind}: adjust renorm", adjust.renorm(kind, tuning.THREADS)
            yield f"finalize {kind}: adjust gradient", adjust.renorm_gradient(kind, tuning.THREADS)
    for kind in ("f32", "f64"):
        yield f"finalize {kind}: gang clear", gang_sums.clear(kind, tuning.THREADS)
    yield "finalize: masks count", masks.count(tuning.THREADS)
    yield "finalize: masks gather", masks.gather(tuning.THREADS)
    yield "finalize: masks tally", masks.tally(tuning.THREADS)
    yield "finalize: masks from lengths", masks.from_lengths("i64", tuning.THREADS)


def _split(kind: str, W: int, relu: bool, residual: bool, suffix: str) -> Iterator[tuple[str, Any]]:
    from fastbn.cuda import planes, rows, tuning
    from fastbn.cuda.sweep import Variant

    what = Variant(kind, W, tuning.THREADS, relu=relu, residual=residual)
    back = what._replace(backward=True)
    for stage, name in ((planes, "planes"), (rows, "rows")):
        if not relu and not residual:
            yield f"{name} {suffix}: sums", stage.sums(what)
        yield f"{name} {suffix}: normalise", stage.normalise(what)
        yield f"{name} {suffix}: normalise given", stage.normalise(what._replace(given=True))
        yield f"{name} {suffix}: backward sums", stage.sums(back)
        yield f"{name} {suffix}: gradient", stage.gradient(back)
        yield f"{name} {suffix}: gradient frozen", stage.gradient(back._replace(frozen=True))


def _flat(kind: str, W: int, relu: bool, residual: bool, suffix: str) -> Iterator[tuple[str, Any]]:
    from fastbn.cuda import flat, tuning
    from fastbn.cuda.sweep import Variant

    what = Variant(kind, W, tuning.THREADS, relu=relu, residual=residual)
    for layout, depth in itertools.product(flat.MAKE, (1, 2)):
        given = flat.normalise(what._replace(given=True), layout, depth)
        yield f"flat {suffix} {layout} x{depth}: normalise given", given
        if depth == 1:
            yield f"flat {suffix} {layout} x1: normalise", flat.normalise(what, layout, 1)


def _whole(
    kind: str, W: int, relu: bool, residual: bool, suffix: str, target: tuple[int, int]
) -> Iterator[tuple[str, Any]]:
    from fastbn.cuda import bundle, bundle_backward, gang, gang_backward, persistent, slab, tuning
    from fastbn.cuda.plan import persistent_threads
    from fastbn.cuda.sweep import Variant

    for layers, alone in itertools.product((2,) if kind == "f64" else tuning.GANG_LAYERS, (False, True)):
        what = Variant(kind, W, tuning.GANG_THREADS, relu=relu, residual=residual, layers=layers, alone=alone)
        name = f"gang {suffix} {what.threads}x{layers}{' alone' * alone}"
        yield f"{name}: train", gang.train(what)
        yield f"{name}: backward", gang_backward.backward(what._replace(backward=True))
    what = Variant(kind, W, tuning.BUNDLE_THREADS, relu=relu, residual=residual, layers=tuning.BUNDLE_LAYERS)
    yield f"bundle {suffix} {what.threads}: train", bundle.train(what)
    yield f"bundle {suffix} {what.threads}: backward", bundle_backward.backward(what._replace(backward=True))
    sizes = {slab: [threads for _, threads in tuning.SLAB], persistent: [persistent_threads(target)]}
    for stage, name in ((slab, "slab"), (persistent, "persistent")):
        for threads in sizes[stage]:
            what = Variant(kind, W, threads, relu=relu, residual=residual)
            yield f"{name} {suffix} {threads}: train", stage.train(what)
            yield f"{name} {suffix} {threads}: backward", stage.backward(what._replace(backward=True))
    small = suffix.replace(f"W{W}", "W1")
    for threads in (tuning.SLAB[0][1], tuning.SLAB[-1][1]):
        what = Variant(kind, 1, threads, relu=relu, residual=residual, kept=False)
        yield f"again {small} {threads}: train", slab.train(what)
        yield f"again {small} {threads}: backward", slab.backward(what._replace(backward=True))
    what = Variant(kind, W, persistent_threads(target), relu=relu, residual=residual, alone=True)
    yield f"alone {suffix} {what.threads}: train", persistent.train(what)
    yield f"alone {suffix} {what.threads}: backward", persistent.backward(what._replace(backward=True))


def _masked(kind: str, W: int, target: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    from fastbn.cuda import persistent, planes, rows, slab, tuning
    from fastbn.cuda.plan import persistent_threads
    from fastbn.cuda.sweep import Variant

    what = Variant(kind, W, tuning.THREADS, relu=True, residual=True, masked=True)
    rounds = what._replace(threads=persistent_threads(target))
    whole = {
        f"slab {kind} W{W} 512": (slab, what._replace(threads=tuning.MASKED_THREADS)),
        f"slab {kind} W{W} 128": (slab, what._replace(threads=128)),
        f"again {kind} W1 512": (slab, what._replace(W=1, threads=tuning.MASKED_THREADS, kept=False)),
        f"persistent {kind} W{W}": (persistent, rounds),
        f"alone {kind} W{W}": (persistent, rounds._replace(alone=True)),
    }
    for name, (stage, one) in whole.items():
        yield f"masked {name} relu residual: train", stage.train(one)
        yield f"masked {name} relu residual: backward", stage.backward(one._replace(backward=True))
    back = what._replace(backward=True)
    for stage, name in ((planes, "planes"), (rows, "rows")):
        yield f"masked {name} {kind} W{W}: sums", stage.sums(what._replace(relu=False, residual=False))
        yield f"masked {name} {kind} W{W} relu residual: normalise", stage.normalise(what)
        yield f"masked {name} {kind} W{W} relu residual: backward sums", stage.sums(back)
        yield f"masked {name} {kind} W{W} relu residual: gradient", stage.gradient(back)


def _sets(kind: str, W: int) -> Iterator[tuple[str, Any]]:
    from fastbn.cuda import sets, sets_columns, sets_held, sets_kept, sets_staged, tuning
    from fastbn.cuda.sets import SetVariant

    warps, blocks = ((256, 1), (256, 2)), ((256, 1), (64, 3), (96, 2), (512, 2), (512, 4))
    for threads, team, held in (*((n, 32, h) for n, h in warps), *((n, n, h) for n, h in blocks)):
        what = SetVariant(kind, W, threads, "each", team, held=held)
        name = f"held {kind} W{W} each {threads}/{team} x{held}"
        if held < 3 or W > 2:
            yield f"{name}: train", sets_held.train(what)
        if held != 3 and (held < 4 or W < 8):
            yield f"{name}: backward", sets_staged.backward(what)
    for affine, threads, team in (("run", 256, 32), ("one", 1024, 1024)):
        what = SetVariant(kind, W, threads, affine, team, held=4 if W > 2 else 2)
        yield f"held {kind} W{W} {affine} {threads}/{team}: train", sets_held.train(what)
    warp = SetVariant(kind, W, tuning.THREADS, "each", 32, True)
    variants = {f"W{W} {affine} warp": warp._replace(affine=affine) for affine in ("one", "run", "each")}
    variants |= {f"W{W} each {n}": warp._replace(threads=n, team=n) for n in (512, 1024)}
    variants["W1 each warp"] = warp._replace(W=1, kept=False)
    for name, what in variants.items():
        yield f"sets {kind} {name}: train", sets_kept.train(what)
        yield f"sets {kind} {name}: backward", sets_kept.backward(what)
    for affine in ("run", "each"):
        what = warp._replace(affine=affine, team=0, kept=False)
        for stage in (sets.sums, sets.normalise, sets.gradient):
            yield f"sets {kind} W{W} {affine} split: {stage.__name__}", stage(what)
    for lanes in (W, 1):
        yield f"sets {kind} W{lanes} columns: sums", sets_columns.sums(kind, lanes, tuning.THREADS)


def compiled_for(kernel: Any, target: tuple[int, int]) -> tuple[Any, Any]:
    """Compile one kernel for one target; return it as Numba keeps it, and its machine code."""
    from numba import cuda
    from numba.cuda import dispatcher

    try:
        from numba.cuda.core import sigutils
    except ImportError:  # older numba-cuda shares it with Numba
        from numba.core import sigutils

    pretend_device(target)
    types, _ = sigutils.normalize_signature(kernel.signature)
    options = cuda.jit(**kernel.options)(kernel.function).targetoptions
    compiled = dispatcher._Kernel(kernel.function, types, **options)
    return compiled, compiled._codelibrary.get_cubin(cc=target)


def store(part: str, target: tuple[int, int]) -> int:
    """Compile every N-th kernel from the I-th (``part`` is "I/N") into the store; return how many."""
    from fastbn.cuda.stored import Store

    first, step = map(int, part.split("/"))
    count = 0
    for _, kernel in itertools.islice(kernels(target), first, None, step):
        place = Store.of(kernel, target)
        if place is not None and not place.path.exists():
            place.save_overload(None, compiled_for(kernel, target)[0])
            count += 1
    return count


def examine(kernel: Any, target: tuple[int, int]) -> dict[str, Any]:
    """Compile one kernel for one target and read its machine code."""
    compiled, code = compiled_for(kernel, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(code if isinstance(code, bytes | bytearray) else code.code)
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    entry = re.escape(compiled.entry_name)  # a cooperative kernel brings functions of the CUDA device runtime along
    found = re.search(rf"Function {entry}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    body = re.search(rf"^\.text\.{entry}:(.*?)(?=^\.text\.|^\s*\.section|\Z)", sass, re.M | re.S)
    assert found and body, usage.stdout + usage.stderr
    instructions = INSTRUCTION.findall(body[1])
    memory = collections.Counter(i for i in instructions if MEMORY.match(i))
    wide = sum(n for i, n in memory.items() if i.startswith(("LDG", "STG")) and ".128" in i)
    return {
        "registers": int(found[1]), "stack": int(found[2]), "shared": int(found[3]),
        "spills": sum(n for i, n in memory.items() if i.startswith(("LDL", "STL"))),
        "global_128": wide, "instructions": len(instructions),
        "float64": sum(1 for i in instructions if DOUBLE.match(i)),
    }  # fmt: skip


def table(targets: Any = TARGETS, only: str = "") -> dict[str, dict[str, Any]]:
    """Return the whole table, ``{"sm_90 planes f32 W4: sums": {...}}``; ``only``: kernels whose name begins so."""
    rows = {}
    for each in zip(*(kernels(target) for target in targets), strict=True):
        for target, (name, kernel) in zip(targets, each, strict=True):
            if name.startswith(only):
                rows[f"sm_{target[0]}{target[1]} {name}"] = examine(kernel, target)
    return rows


def complaints(rows: dict[str, dict[str, Any]], known: dict[str, dict[str, Any]]) -> list[str]:
    """What is worse than it must be, or than it was."""
    found = []
    for name, row in rows.items():
        was = known.get(name)
        if row["spills"]:
            found.append(f"{name}: {row['spills']} spills")
        if row["float64"] and " f64" not in name:
            found.append(f"{name}: float64 instructions in a float32 kernel")
        if was is None:
            found.append(f"{name}: not in the table; run python -m bench.gpu_compile --write")
        elif row["global_128"] < was["global_128"]:
            found.append(f"{name}: {row['global_128']} 128-bit accesses, were {was['global_128']}")
        elif row["registers"] > was["registers"] + 8:
            found.append(f"{name}: {row['registers']} registers, were {was['registers']}")
        if not row["global_128"] and " W1" not in name and not name.split(" ", 1)[1].startswith("finalize"):
            found.append(f"{name}: no 128-bit access")
    return found


def main() -> None:
    """Print the table; write it, or compare it with the written one and fail."""
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        return
    if "--store" in sys.argv:
        part = sys.argv[sys.argv.index("--store") + 1]
        named = next((a[4:] for a in sys.argv if re.fullmatch(r"--sm\d+", a)), "90")
        print(store(part, (int(named[:-1]), int(named[-1]))), "kernels compiled")
        return
    only = next((a for a in sys.argv[1:] if not a.startswith("-")), "")
    rows = table(((9, 0),) if "--sm90" in sys.argv else TARGETS, only)
    for name, row in rows.items():
        print(f"{name:55s} {row}")
    if "--check" in sys.argv:
        found = complaints(rows, json.loads(TABLE.read_text()))
        sys.exit("\n".join(found) or None)
    if "--write" in sys.argv:
        if only:  # the others as they are
            known = json.loads(TABLE.read_text())
            left = {k for k in known if not k.split(" ", 1)[1].startswith(only)} | {*rows}
            rows = {k: rows.get(k, v) for k, v in known.items() if k in left} | rows  # in their order
        TABLE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + "\n}\n")


if __name__ == "__main__":
    main()
