"""What Numba works out hundreds of times while one of our kernels compiles is worked out once.

A kernel is 50 parts that call each other and the same dozen intrinsics and operators on the same dozen types. For every
single call Numba (0.68) asks all templates of the operator (2,700 times, 106 different questions), for every assignment
LLVM for the size of the type (560 times, 13 types, each in a module of its own that is written out and parsed), and for
every part all of its declarations whether there are new ones. Together a third of a first compilation. And five times
for every part it works out which variables live where, which it looks at once: another fifteenth.

The answers are kept on Numba's own contexts, under its compiler lock, for as long as the compilation takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from numba.core.postproc import PostProcessor
from numba.core.registry import cpu_target
from numba.core.transforms import canonicalize_cfg
from numba.core.types import BaseFunction, Type


def _size(ask: Callable[[Any], int]) -> Callable[[Any], int]:
    """Return ``get_abi_sizeof`` that remembers."""
    known: dict[Any, int] = {}

    def get_abi_sizeof(kind: Any) -> int:
        if kind not in known:
            known[kind] = ask(kind)
        return known[kind]

    return get_abi_sizeof


def _signature(ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``BaseFunction.get_call_type`` that remembers what it has found for final types."""
    known: dict[Any, Any] = {}

    def get_call_type(function: Any, typing: Any, args: Any, kws: Any) -> Any:
        if kws or not all(isinstance(kind, Type) and kind.is_precise() for kind in args):
            return ask(function, typing, args, kws)
        key = function, id(typing), tuple(args)
        found = known.get(key)
        if found is None:
            found = known[key] = ask(function, typing, args, kws)
        return found

    return get_call_type


def _refresh(ask: Callable[[], None]) -> Callable[[], None]:
    """Return ``refresh`` that takes in declarations only from where there are new ones."""
    ask()
    context = cpu_target.target_context
    registries = list(getattr(context, "_registries", ()))
    known = [len(registry.functions) for registry in registries]

    def refresh() -> None:
        for i, registry in enumerate(registries):
            if known[i] != len(registry.functions):
                known[i] = len(registry.functions)
                context.install_registry(registry)

    return refresh if registries else ask


def _processing(run: Callable[..., None]) -> Callable[..., None]:
    """Return ``PostProcessor.run`` that asks for lives of variables only where their ends are to be marked."""

    def brief(process: Any, emit_dels: bool = False, extend_lifetimes: bool = False) -> None:
        if emit_dels or process.func_ir.is_generator:
            run(process, emit_dels, extend_lifetimes)
        else:
            process.func_ir.blocks = canonicalize_cfg(process.func_ir.blocks)
            process.func_ir.generator_info = None

    return brief


@contextlib.contextmanager
def _answering(owner: Any, name: str, answering: Callable[[Any], Any]) -> Iterator[None]:
    """Within, ``owner.name`` is another function, if Numba still has one of that name."""
    if not hasattr(owner, name):
        yield
        return
    before = vars(owner).get(name)
    setattr(owner, name, answering(getattr(owner, name)))
    try:
        yield
    finally:
        if before is None:  # it was the class's
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Within, Numba remembers; not nested: a kernel's compilation is one, and its parts are compiled in it."""
    context = cpu_target.target_context
    with (
        _answering(context, "refresh", _refresh),
        _answering(context, "get_abi_sizeof", _size),
        _answering(BaseFunction, "get_call_type", _signature),
        _answering(PostProcessor, "run", _processing),
    ):
        yield
