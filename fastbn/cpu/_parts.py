"""How the parts of kernels are compiled: to LLVM IR alone, which is optimised once, in the kernel it ends up in.

Numba gives every function that another one calls a life of its own: two wrappers for calls from Python and C, two
rounds of optimisation, machine code. A kernel here has 50 such parts and nobody else calls them; without all that its
first compilation takes three quarters of the time. Nothing here is needed for right results: where Numba's inside has
changed, ``OPTIONS`` is empty and parts are compiled as usual.
"""

from __future__ import annotations

import ctypes
from typing import Any

try:
    from numba import _dynfunc
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import CompilerBase, DefaultPassBuilder
    from numba.core.compiler_machinery import register_pass
    from numba.core.typed_passes import NativeLowering

    class _Part(JITCodeLibrary):  # type: ignore[misc]
        """A library that others link and nobody runs.

        The passes over single functions stay: without them LLVM merges the streaming store of a branch with the
        ordinary one of the other, and bfloat16 training takes 6.4 copies instead of 2.
        """

        def _optimize_final_module(self) -> None:
            """Leave that to the kernel."""

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

    @ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.py_object)  # type: ignore[untyped-decorator]
    def _not_callable(module: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError("a part of kernels cannot be called from Python")

    @register_pass(mutates_CFG=True, analysis_only=False)
    class _PartLowering(NativeLowering):  # type: ignore[misc]
        """Lower into such a library; tell other functions where it is, and make no machine code."""

        _name = "fastbn_part_lowering"

        def run_pass(self, state: Any) -> bool:
            context, name = state.targetctx, state.func_id.func_qualname
            state.library = _Part(context.codegen(), name)
            state.library.enable_object_caching()
            state.flags.no_compile = True
            super().run_pass(state)
            result = state["cr"]
            address = ctypes.cast(_not_callable, ctypes.c_void_p).value
            entry = _dynfunc.make_function(
                result.fndesc.lookup_module(), name, "part of kernels", address, result.env, (state.library,)
            )
            context.insert_user_function(entry, result.fndesc, [state.library])
            state["cr"] = result._replace(cfunc=entry)
            return True

    class _PartCompiler(CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
            pipeline.passes = [
                (_PartLowering, about) if kind is NativeLowering else (kind, about) for kind, about in pipeline.passes
            ]
            pipeline.finalize()
            return [pipeline]

    OPTIONS: dict[str, Any] = {
        "pipeline_class": _PartCompiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
    }  # fmt: skip
except (ImportError, AttributeError):  # pragma: no cover
    OPTIONS = {}
