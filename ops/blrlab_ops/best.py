"""The best implementation as an operator of its own, for tracers: chosen by the number of tokens when it runs.

A graph that `torch.compile` makes for one number of tokens may run with others. So `impl=None` becomes an operator,
`blrlab_ops::<format>_best`, that looks the choice up in every call.
"""

import functools

import torch
from torch import Tensor

from . import dispatch
from .blast.torch_bmm import gradients as blast_gradients
from .custom_ops import operator
from .epilogue import Epilogue
from .low_rank.torch_bmm import gradients as low_rank_gradients
from .monarch.torch_bmm import gradients as monarch_gradients


def _compute(format: str, x: Tensor, *rest) -> Tensor:
    *factors, bias, epilogue = rest
    assert isinstance(epilogue, Epilogue)
    with torch.no_grad():
        return dispatch.run(format, None, x, factors, bias, epilogue)


LINEARS = {
    "low_rank": operator(
        "low_rank",
        "best",
        "VU",
        lambda V, U: U.shape[1],
        None,
        low_rank_gradients,
        functools.partial(_compute, "low_rank"),
    ),
    "monarch": operator(
        "monarch",
        "best",
        "VU",
        lambda V, U: V.shape[1] * U.shape[3],
        None,
        monarch_gradients,
        functools.partial(_compute, "monarch"),
    ),
    "blast": operator(
        "blast",
        "best",
        "VSU",
        lambda V, S, U: U.shape[0] * U.shape[2],
        None,
        blast_gradients,
        functools.partial(_compute, "blast"),
    ),
}
