"""The source paper's kernels: a clone that computes by its conventions, in plain torch, agrees with float64."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from blrlab_ops.testing import Case

from blrlab.bench import backends, paper
from blrlab.bench.gate import Judge
from blrlab.bench.problem import Group, Problem
from blrlab.errors import InputError

# Operands and results as the repository documents them, blocks numbered l (input) and k (output):
# its operands are contiguous, its input has a batch in front.
KERNELS = {
    "low_rank": """
def triton_low_rank_fp16(x, v, u):
    check(v, u)
    return torch.einsum("ni,ir,ro->no", x.flatten(0, -2), v, u)  # [n, o], without the batch
""",
    "monarch": """
def stage_one(x, w1):
    l = w1.shape[0]
    found = torch.einsum("anlp,lpc->anlc", x.unflatten(-1, (l, -1)), w1)
    return found.unflatten(-1, (l, -1))  # [batch, n, l, k, r'], a column of w1 is (k, r') and as many k as l

def stage_two(between, w2):
    y = torch.einsum("anlks,klsq->anqk", between, w2.unflatten(1, (between.shape[2], -1)))
    return y.flatten(2)  # the output blocks are the fastest

def triton_monarch_right_fp16(x, w1, w2_turned):
    check(w1, w2_turned)
    return stage_two(stage_one(x, w1), w2_turned.transpose(1, 2))

def triton_monarch_right_left_fp16(x, w1, w2):
    check(w1, w2)
    return stage_two(stage_one(x, w1), w2)
""",
    "blast": """
def blast(x, u, v, s):  # [k, r, q], [l, p, r], [l, k, r]
    return torch.einsum("anlp,lpr,lkr,krq->ankq", x.unflatten(-1, (v.shape[0], -1)), v, s, u).flatten(2)

def triton_blast_partial_grouped_fp16(x, u, v, s):
    check(u, v, s)
    return blast(x, u, v, s)

triton_blast_partial_grouped_persistent_fp16 = triton_blast_partial_grouped_fp16

def triton_blast_bmm_fp16(x, u, v, s):  # [k, q, r], [l, p, r], [r, k, l]
    check(u, v, s)
    return blast(x, u.transpose(1, 2), v, s.permute(2, 1, 0))
""",
}
HEADER = """
import torch
from helper_of_the_clone import BATCH

def check(*operands):
    assert all(operand.is_contiguous() for operand in operands)
"""
SIZES = {
    "low_rank": Case("low_rank", 5, 24, 36, (1, 1), 7),
    "monarch": Case("monarch", 5, 24, 36, (3, 3), 4),
    "blast": Case("blast", 5, 24, 36, (3, 3), 7),
}


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("triton_funcs", "helper_of_the_clone")]:
        del sys.modules[name]
    paper._module.cache_clear()


@pytest.fixture
def clone(tmp_path: Path):
    """A folder laid out as the paper's repository, whose modules import one of its root."""
    folder = tmp_path / "clone"
    (folder / "triton_funcs").mkdir(parents=True)
    (folder / "helper_of_the_clone.py").write_text("BATCH = 1\n")
    for format, code in KERNELS.items():
        (folder / "triton_funcs" / f"{format}_kernels.py").write_text(HEADER + code)
    forget()
    yield folder
    forget()


def layer(case: Case, dtype: str = "float32") -> Problem:
    (made,) = Group("custom", "a", dtype, (case,)).problems(torch.device("cpu"))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", paper.VARIANTS)
def test_a_kernel_of_the_paper_gets_its_layout_and_its_output_is_put_in_order(clone, name: str, dtype: str) -> None:
    run = backends.backend(name, clone)
    assert run.ops == (paper.VARIANTS[name].op,)
    assert not run.own, "it is judged as a library"
    each = layer(SIZES[run.ops[0]], dtype)
    y = run.to_rows(each, run.make(each, each.kernel)())
    assert tuple(y.shape) == (5, 36)
    assert Judge(each).judge(y, None).passed


@pytest.mark.parametrize("name", [name for name, variant in paper.VARIANTS.items() if variant.op == "monarch"])
def test_the_columns_of_its_monarch_are_interleaved_until_then(clone, name: str) -> None:
    each, run = layer(SIZES["monarch"]), backends.backend(name, clone)
    raw = run.make(each, each.kernel)()
    assert tuple(raw.shape) == (1, 5, 36)
    assert not Judge(each).judge(raw[0], None).passed
    assert torch.equal(run.to_rows(each, raw)[:, :12], raw[0, :, ::3]), "the first output block is every third column"


def test_factors_of_any_strides_are_laid_out_anew_and_left_as_they_are(clone) -> None:
    for name, variant in paper.VARIANTS.items():
        each = layer(SIZES[variant.op])
        turned = {key: leaf.mT.contiguous().mT for key, leaf in each.kernel.items()}
        before = {key: leaf.clone() for key, leaf in turned.items()}
        run = backends.backend(name, clone)
        assert Judge(each).judge(run.to_rows(each, run.make(each, turned)()), None).passed, name
        assert all(torch.equal(turned[key], before[key]) for key in before), name


def test_the_layout_is_made_once_and_not_in_every_call(clone, monkeypatch: pytest.MonkeyPatch) -> None:
    laid: list[str] = []
    variant = paper.VARIANTS["paper_monarch_right"]

    def operands(kernel):
        laid.append("once")
        return variant.operands(kernel)

    each = layer(SIZES["monarch"])
    call = paper.call(dataclasses.replace(variant, operands=operands), clone, each, each.kernel)
    call(), call()
    assert laid == ["once"]


def test_the_path_is_left_as_it_was(clone) -> None:
    before = list(sys.path)
    each = layer(SIZES["blast"])
    backends.backend("paper_blast_bmm", clone).make(each, each.kernel)
    assert sys.path == before


def test_a_module_of_the_clone_that_cannot_be_imported_leaves_the_path_too(clone) -> None:
    (clone / "triton_funcs" / "blast_kernels.py").write_text("import a_package_that_is_not_there\n")
    before, each = list(sys.path), layer(SIZES["blast"])
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        backends.backend("paper_blast_bmm", clone).make(each, each.kernel)
    assert sys.path == before


def test_a_folder_that_is_no_clone_is_refused(tmp_path: Path) -> None:
    sentence = r"no triton_funcs/monarch_kernels.py in .*: clone https://github.com/.* there"
    each = layer(SIZES["monarch"])
    with pytest.raises(InputError, match=sentence):
        paper.check(tmp_path)
    with pytest.raises(InputError, match=sentence):
        backends.backend("paper_monarch_right", tmp_path).make(each, each.kernel)
    with pytest.raises(InputError, match=r"need a clone of https://github\.com/"):
        backends.backend("paper_monarch_right", None).make(each, each.kernel)


def test_a_clone_is_accepted(clone) -> None:
    paper.check(clone)


def on_gpu(case: Case, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Make a problem whose input is said to lie on a GPU."""

    class Input:
        device = torch.device("cuda")

        def __init__(self) -> None:
            self.dtype = dtype

    return Problem("custom", "a", case, {}, Input())


@pytest.mark.parametrize("name", paper.VARIANTS)
def test_without_a_gpu_its_kernels_decline(name: str) -> None:
    each = layer(SIZES[paper.VARIANTS[name].op], "bfloat16")
    assert backends.why_not(name, each) == "the paper's kernels need a CUDA GPU"


@pytest.mark.parametrize("name", paper.VARIANTS)
def test_on_a_gpu_they_take_bfloat16_only(name: str) -> None:
    case = SIZES[paper.VARIANTS[name].op]
    assert backends.why_not(name, on_gpu(case)) is None
    for dtype in (torch.float16, torch.float32):
        assert backends.why_not(name, on_gpu(case, dtype)) == "the paper's timed kernels are bfloat16 only"


@pytest.mark.parametrize("blocks", [(3, 2), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("format", ["monarch", "blast"])
def test_they_want_as_many_input_as_output_blocks_and_more_than_one(format: str, blocks) -> None:
    sentence = "the paper's kernels want as many input as output blocks, and more than one"
    assert paper.why_not(on_gpu(SIZES[format]._replace(blocks=blocks))) == sentence
    assert paper.why_not(on_gpu(SIZES["low_rank"])) is None
