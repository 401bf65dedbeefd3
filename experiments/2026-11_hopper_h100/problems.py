"""What the programs of this study share: a layer with its operands, its exact result, how a call is timed, cuBLAS."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from cuts import Layer, Stage
from torch import Tensor

HERE = Path(__file__).resolve()
WEIGHT_BYTES, MOST_COPIES = 200_000_000, 40  # of weights that take turns, so that they come from memory
MOST_ERROR = 1.2  # times that of rounding the exact result

Launch = Callable[[], Any]


class Problem:
    """One layer with its operands; weights are stored output by output, as `blrlab_ops` stores them."""

    def __init__(self, layer: Layer, device: str):
        """Draw copies of the weights and one input, and the exact result where something runs."""
        self.layer, (_, _, i, o, b, rank, n) = layer, layer
        self.p, self.q, self.between = i // b, o // b, b * rank
        bytes_of_one = 2 * rank * b * (i + o)
        copies = min(MOST_COPIES, max(2, WEIGHT_BYTES // bytes_of_one)) if device == "cuda" else 1
        torch.manual_seed(0)
        draw = torch.randn if device == "cuda" else torch.empty
        self.x = draw(n, i, device=device).bfloat16()
        self.weights = []
        for _ in range(copies):
            V = draw(b, rank, b, self.p, device=device) / self.p**0.5
            U = draw(b, self.q, b, rank, device=device) / self.between**0.5
            self.weights.append((V.bfloat16(), U.bfloat16()))
        self.y = torch.empty(n, o, device=device, dtype=torch.bfloat16)
        self.Z = torch.empty(b * n * self.between, device=device, dtype=torch.bfloat16)
        if device == "cuda":
            V, U = (factor.double() for factor in self.weights[0])
            exact = torch.einsum("nlp,lrkp->knlr", self.x.view(n, b, self.p).double(), V).reshape(b, n, self.between)
            self.exact_Z, self.rounded_Z = exact, exact.bfloat16()
            U = U.reshape(b, self.q, self.between)
            self.exact = torch.einsum("knd,kqd->nkq", self.rounded_Z.double(), U).reshape(n, o)

    def panels(self, panel: int) -> Tensor:
        """Return Z in panels of so many columns, [b2, panels, n, panel]."""
        return self.Z.view(self.layer.blocks, self.between // panel, self.layer.tokens, panel)

    def held(self, panel: int) -> Tensor:
        """Return Z as [b2, n, b1 r'] whatever its layout."""
        return self.panels(panel).transpose(1, 2).reshape(self.layer.blocks, self.layer.tokens, self.between)

    def fill(self, panel: int, value: Tensor) -> None:
        """Write Z [b2, n, b1 r'] in a layout."""
        b, n = self.layer.blocks, self.layer.tokens
        self.panels(panel).copy_(value.view(b, n, self.between // panel, panel).transpose(1, 2))

    def first(self, stage: Stage, panel: int, copy: int) -> tuple[Any, ...]:
        """Return what `launch` needs for Z = x V."""
        _, _, i, _, b, rank, n = self.layer
        V, p, width = self.weights[copy][0], self.p, self.between
        a = (self.x, [1, n, i], [n * i, i, 1])
        factor = (V, [b, b, rank, p], [V.stride(0), V.stride(2), V.stride(1), 1])
        c = (self.Z, [b, width // panel, n, panel], [n * width, n * panel, panel, 1])
        numbers = (0, 0, p, 0, rank, n, width, n * width, panel)
        return stage, a, factor, c, panel, numbers, self.Z, b, p

    def second(self, stage: Stage, panel: int, copy: int) -> tuple[Any, ...]:
        """Return what `launch` needs for y = Z U."""
        _, _, _, o, b, _, n = self.layer
        U, q, width = self.weights[copy][1], self.q, self.between
        a = (self.Z, [b * width // panel, n, panel], [n * panel, panel, 1])
        factor = (U, [b, 1, q, width], [q * width, q * width, width, 1])
        c = (self.y, [b, 1, n, q], [q, n * o, o, 1])
        by_panels = int(panel == stage.depth)
        numbers = (width // panel, by_panels, 0, 1, 0, n, q, q, o)
        return stage, a, factor, c, 1 << 16, numbers, self.y, b, width


def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the relative Frobenius error and the largest error over the truth's root mean square."""
    lost = result.double() - truth
    return float(lost.norm() / truth.norm()), float(lost.abs().max() / truth.square().mean().sqrt())


def times(calls: Sequence[Launch], replays: int = 15) -> tuple[float, float, float]:
    """Return 20th, 50th and 80th percentile of a call's time (us), from graphs of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.stream(stream):
        calls[0]()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / len(calls))
    found.sort()
    p20, p50, p80 = (found[int(share * len(found))] for share in (0.2, 0.5, 0.8))
    return p20, p50, p80


def library(problem: Problem) -> Iterator[tuple[dict[str, Any], list[Launch]]]:
    """Yield cuBLAS dense, and two batched products of factors and an intermediate already in the best order."""
    _, _, i, o, b, _, n = problem.layer
    copies = min(12, max(2, WEIGHT_BYTES // (2 * i * o)))
    dense = [torch.randn(o, i, device="cuda").bfloat16() for _ in range(copies)]
    yield (
        {"op": "dense", "impl": "torch_linear"},
        [lambda weight=weight: torch.nn.functional.linear(problem.x, weight) for weight in dense],
    )
    del dense
    blocks = problem.x.view(n, b, problem.p).transpose(0, 1)
    Z, y = torch.randn(2, b, n, problem.between, device="cuda").bfloat16(), problem.y.view(b, n, problem.q)

    def two(V: Tensor, U: Tensor) -> Launch:
        first, second = V.reshape(b, -1, problem.p).transpose(1, 2), U.reshape(b, problem.q, -1).transpose(1, 2)
        return lambda: (torch.bmm(blocks, first, out=Z[0]), torch.bmm(Z[1], second, out=y))

    yield {"impl": "two_bmm", "note": "nothing permuted"}, [two(V, U) for V, U in problem.weights]


def start(problem: Problem) -> dict[str, Any]:
    """Return what all rows of a layer share."""
    net, layer, i, o, b, rank, n = problem.layer
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE.parent, capture_output=True, text=True)
    return {
        **{"kind": "bench", "op": "monarch", "impl": "hopper_product", "net": net, "layer": layer, "in_features": i},
        **{"out_features": o, "blocks": [b, b], "rank": b * rank, "tokens": n, "dtype": "bfloat16", "unit": "us"},
        **{"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__},
        **{"commit": git.stdout.strip() or None},
        "method": "CUDA graph of a call on every copy of the weights, CUDA events, 15 replays",
    }
