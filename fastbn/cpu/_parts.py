"""How the parts of kernels are compiled: to LLVM IR alone, which is optimised once, in the kernel it ends up in.

Numba gives every function that another one calls a life of its own: two wrappers for calls from Python and C, two
rounds of optimisation, machine code. A kernel here has 50 such parts and nobody else calls them; without all that its
first compilation takes three quarters of the time. Nothing here is needed for right results: where Numba's inside has
changed, ``OPTIONS`` and ``KERNEL_OPTIONS`` are empty and all is compiled as usual.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Any

LINE = 64  # bytes: a vector

try:
    from llvmlite.binding import Linkage
    from numba import _dynfunc
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import CompilerBase, DefaultPassBuilder
    from numba.core.compiler_machinery import register_pass
    from numba.core.typed_passes import IRLegalization, NativeLowering

    from fastbn.cpu._interrupts import held_back
    from fastbn.cpu._remembered import remembered

    class _Kernel(JITCodeLibrary):  # type: ignore[misc]
        """A library whose functions begin at a multiple of LINE on the stack.

        LLVM moves vectors to the stack in the middle of loops, by default to multiples of 16 bytes. Where one of them
        lay on two pages, in one process in thirty, bfloat16 training took 4.6 times as long.
        """

        _linking_libraries: Any
        _called: Any

        def add_ir_module(self, ir_module: Any) -> None:
            for function in ir_module.functions:
                if function.blocks:
                    function.attributes.alignstack = LINE
                    function.attributes.add("nounwind")  # llvmlite writes alignstack only beside another one
            super().add_ir_module(ir_module)

        def finalize(self) -> None:
            """Link what is called, and what parts call, who link nothing themselves."""
            self._called, self._linking_libraries = self._closure(), []
            super().finalize()

        def _closure(self) -> list[Any]:
            """Return what this library and its parts call, callers first: LLVM links nothing that nobody calls yet."""
            found: list[Any] = []
            self._add_called(found)
            return found[::-1]

        def _add_called(self, found: list[Any]) -> None:
            """Add what this library calls, each behind what it calls itself."""
            for called in self._linking_libraries:
                if called not in found:
                    if isinstance(called, _Part):
                        called._add_called(found)
                    found.append(called)

        def _optimize_final_module(self) -> None:
            _link(self._final_module, self._called)
            super()._optimize_final_module()

    class _Part(_Kernel):
        """A library that kernels link and nobody runs. It links nothing itself; all optimisation is left to the kernel.

        That needs streaming stores which LLVM cannot merge with the ordinary ones of another branch (``stream``): with
        plain ones bfloat16 training took 6.4 copies instead of 2.
        """

        def _optimize_functions(self, ll_module: Any) -> None:
            """Leave that to the kernel."""

        def finalize(self) -> None:
            self._raise_if_finalized()
            self._finalize_dynamic_globals()
            self._finalized = True

        def alone(self) -> Any:
            """Return the module of this part, whose functions are dropped where they are inlined."""
            self._ensure_finalized()
            for function in self._final_module.functions:
                if not function.is_declaration and function.linkage == Linkage.external:
                    function.linkage = Linkage.linkonce_odr
            return self._final_module

        def _get_module_for_linking(self) -> Any:
            """Return what others than kernels link: this part with all that it calls."""
            whole = self.alone().clone()
            _link(whole, self._closure())
            return whole

    def _link(module: Any, libraries: list[Any]) -> None:
        """Link libraries into a module, of parts no more than themselves."""
        for library in libraries:
            other = library.alone() if isinstance(library, _Part) else library._get_module_for_linking()
            module.link_in(other, preserve=True)

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

    @register_pass(mutates_CFG=True, analysis_only=False)
    class _KernelLowering(NativeLowering):  # type: ignore[misc]
        """Lower into such a library."""

        _name = "fastbn_kernel_lowering"

        def run_pass(self, state: Any) -> bool:
            state.library = _Kernel(state.targetctx.codegen(), state.func_id.func_qualname)
            state.library.enable_object_caching()
            return bool(super().run_pass(state))

    @register_pass(mutates_CFG=False, analysis_only=True)
    class _Ends(IRLegalization):  # type: ignore[misc]
        """Mark where variables end, for functions that own memory: others need not care, and are a third longer."""

        _name = "fastbn_ends"

        def run_pass(self, state: Any) -> bool:
            models = state.targetctx.data_model_manager
            if any(models[kind].contains_nrt_meminfo() for kind in set(state.typemap.values())):
                return bool(super().run_pass(state))
            return False

    # Passes for what kernels do not have: with blocks, closures, functions inlined by Numba, literal_unroll, literally.
    _NEEDLESS = {
        "WithLifting", "InlineClosureLikes", "RewriteDynamicRaises", "MakeFunctionToJitFunction", "InlineInlinables",
        "FindLiterallyCalls", "LiteralUnroll", "LiteralPropagationSubPipelinePass", "InlineOverloads",
        "NopythonRewrites",
    }  # fmt: skip

    def _pipeline(state: Any, lowering: Any) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(state)
        ours = {NativeLowering: lowering, IRLegalization: _Ends}
        pipeline.passes = [
            (ours.get(kind, kind), about) for kind, about in pipeline.passes if kind.__name__ not in _NEEDLESS
        ]
        pipeline.finalize()
        return [pipeline]

    class _PartCompiler(CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            return _pipeline(self.state, _PartLowering)

    class _KernelCompiler(CompilerBase):  # type: ignore[misc]
        def define_pipelines(self) -> list[Any]:
            return _pipeline(self.state, _KernelLowering)

        def compile_extra(self, func: Any) -> Any:
            """Compile with the garbage collector at rest: it would look at millions of young objects that stay."""
            collecting = gc.isenabled()
            gc.disable()
            try:
                with held_back(), remembered():
                    return super().compile_extra(func)
            finally:
                if collecting:
                    gc.enable()

    OPTIONS: dict[str, Any] = {
        "pipeline_class": _PartCompiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
    }  # fmt: skip
    KERNEL_OPTIONS: dict[str, Any] = {"pipeline_class": _KernelCompiler, "no_cfunc_wrapper": True}
except (ImportError, AttributeError):  # pragma: no cover
    OPTIONS = KERNEL_OPTIONS = {}
