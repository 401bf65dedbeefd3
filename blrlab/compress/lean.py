"""How fits are compiled where each is called by itself."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# By backend. XLA would try Triton products of many tile sizes for every product of a fit, a minute for each shape of
# Llama-7B's layers on an H100, where 5 s do without; cuBLAS's are as good.
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
