"""How fits are compiled where each is called by itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# By backend. XLA would try Triton products of many tile sizes for every product of a fit, which for each shape of a
# large model's layers takes far longer than a fit; cuBLAS's do as well.
OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def lean(function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """Jit a function with a choice of XLA's options that makes compilation short; not to be called within another jit.

    Args:
      function: what to compile.
      static: the names of its arguments that are no arrays.
    """

    @functools.cache
    def compiled(backend: str) -> Callable[..., Any]:
        return jax.jit(function, static_argnames=static, compiler_options=OPTIONS.get(backend))

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return compiled(jax.default_backend())(*given, **named)

    return call
