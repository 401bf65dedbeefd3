"""What tuning measures: valid candidates, estimates that make sense, and the whole search on an imagined GPU."""

import dataclasses
import importlib
import math

import pytest
import torch
from blrlab_ops import devices, dispatch, shapes
from blrlab_ops.testing import Case
from blrlab_ops.tuning import estimate
from blrlab_ops.tuning.estimate import Work, microseconds
from hypothesis import given, settings
from hypothesis import strategies as st

KERNELS = [(format, impl) for format in dispatch.IMPLS for impl in dispatch.impls(format) if dispatch.is_portable(impl)]
LARGEST_SHARED = 160 * 1024  # bytes that candidates may ask for
CARDS = [devices.DEVICES[name] for name in ("a40", "orin_nano_8gb", "a100_40gb", "h100_sxm")]
WORKS = st.builds(
    Work,
    programs=st.integers(1, 10**5),
    steps=st.integers(1, 10**3),
    step_bytes=st.integers(0, 2**20),
    step_flops=st.integers(0, 10**9),
    cold_bytes=st.integers(0, 10**11),
    shared_bytes=st.integers(0, 300 * 1024),
)
SETTINGS = {"warps": st.sampled_from((1, 2, 4, 8)), "stages": st.integers(1, 4), "card": st.sampled_from(CARDS)}
each_kernel = pytest.mark.parametrize(("format", "impl"), KERNELS)


@settings(deadline=None)
@given(
    work=WORKS,
    field=st.sampled_from(("programs", "steps", "step_bytes", "step_flops", "cold_bytes")),
    more=st.integers(1, 10**6),
    **SETTINGS,
)
def test_more_work_is_never_faster(work, field, more, warps, stages, card):
    larger = work._replace(**{field: getattr(work, field) + more})
    assert microseconds(work, warps, stages, card) <= microseconds(larger, warps, stages, card) * (1 + 1e-12)


@settings(deadline=None)
@given(work=WORKS, **SETTINGS)
def test_infinite_where_it_does_not_fit_and_only_there(work, warps, stages, card):
    us = microseconds(work, warps, stages, card)
    assert math.isinf(us) == (work.shared_bytes > card.shared_bytes_per_sm)
    assert us > 1e6 * work.cold_bytes / card.dram_bytes_per_s


@settings(deadline=None)
@given(work=WORKS, field=st.sampled_from(("tensor_flops", "dram_bytes_per_s")), times=st.floats(1, 10), **SETTINGS)
def test_a_faster_card_is_never_slower(work, field, times, warps, stages, card):
    faster = dataclasses.replace(card, **{field: getattr(card, field) * times})
    assert microseconds(work, warps, stages, faster) <= microseconds(work, warps, stages, card) * (1 + 1e-12)


@settings(deadline=None)
@given(work=WORKS, **SETTINGS)
def test_more_loads_in_flight_are_never_slower(work, warps, stages, card):
    assert microseconds(work, warps, stages + 1, card) <= microseconds(work, warps, stages, card)


def test_the_work_of_a_product():
    tiles = {"BN": 32, "BC": 64, "BD": 128, "DEPTH": 300}
    work = estimate.product(tiles, programs=7, itemsize=2, stages=2, cold_bytes=5)
    assert work == Work(7, 3, 128 * 96 * 2, 2 * 32 * 64 * 128, 5, 2 * 128 * 96 * 2)
    held = estimate.product(tiles | {"HELD1": 256, "HELD2": 64}, 7, 2, 2, 5)
    assert held == Work(7, 1, 320 * 96 * 2, 2 * 32 * 64 * 320, 5, 320 * 96 * 2)  # all of it once, whatever the stages
    alone = estimate.product(tiles | {"BN": 1, "VECTOR": True}, 7, 2, 2, 5)
    assert alone.shared_bytes == 128 * (64 + 1) * 2  # one step waits while another is multiplied
    mixing = estimate.product(tiles | {"PARTS": 16}, 7, 2, 2, 5)
    assert mixing.step_bytes == 128 * (32 * 16 + 64) * 2
    assert mixing.shared_bytes == work.shared_bytes  # the parts are summed in registers


def test_the_work_of_a_chain():
    tiles = {"BN": 32, "BC": 64, "BD": 16, "R1": 32, "R2": 16, "RANK_CHUNKS": 2, "B1": 3, "P": 40}
    work = estimate.chain(tiles, programs=7, itemsize=2, stages=2, cold_bytes=5)
    step_bytes = (16 * (32 + 48) + 48 * 64) * 2
    assert work == Work(7, 2 * 3 * 3, step_bytes, 2 * 32 * 48 * (16 + 64), 5, 2 * step_bytes)


def _case(layer: shapes.Layer, format: str, tokens: int) -> Case:
    rank, blocks = layer.choice(format)
    sizes = (tokens, layer.in_features, layer.out_features)
    return Case(format, *sizes, (blocks, blocks), rank // blocks if format == "monarch" else rank)


def _cases(format: str, impl: str, layers=shapes.LAYERS) -> list[Case]:
    cases = {_case(layer, format, tokens) for layer in layers for tokens in (1, 16, layer.tokens)}
    return sorted(case for case in cases if dispatch.unsuited(impl, dispatch.Layer(*case[1:])) is None)


def _operands(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return x and packed factors that take no memory."""
    (b1, b2), rank = case.blocks, case.rank
    p, q = case.in_features // b1, case.out_features // b2
    sizes = {
        "low_rank": [(p, rank), (rank, q)],
        "monarch": [(b1, b2, p, rank), (b1, b2, rank, q)],
        "blast": [(b1, p, rank), (b1, b2, rank), (b2, rank, q)],
    }[case.format]
    return [torch.empty(size, dtype=dtype, device="meta") for size in [(case.tokens, case.in_features), *sizes]]


def _module(format: str, impl: str):
    return importlib.import_module(f"blrlab_ops.{format}.{impl}")


def _is_power(size: int, least: int) -> bool:
    return size >= least and size & (size - 1) == 0


def _problem(tiles, itemsize: int) -> str | None:
    """Say what is wrong with tiles that one program is to compute; None where nothing is."""
    given = tiles._asdict()
    alone = given.get("vector", False)
    least = 16 if given.get("tensor", True) else 1
    if not _is_power(tiles.rows, 1 if alone else least) or (alone and tiles.rows != 1):
        return "rows"
    if not all(_is_power(given[name], 8 if alone else 16) for name in ("columns", "depth") if name in given):
        return "columns or depth"
    if not all(_is_power(given[name], 1) for name in ("blocks", "ranks") if name in given):
        return "blocks or ranks"
    if tiles.warps not in (1, 2, 4, 8) or tiles.stages < 1:
        return "warps or stages"
    if "columns" in given and not alone and not given.get("held") and tiles.rows * tiles.columns > 2**15:
        return "sums"
    return None


def _tiles(format: str, impl: str, case: Case, dtype: torch.dtype = torch.bfloat16) -> dict[str, list]:
    return _module(format, impl).candidates(*_operands(case, dtype))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_for_the_layers_of_the_paper_are_valid(needs_triton, format, impl, dtype):
    for case in _cases(format, impl):
        for name, tiles in _tiles(format, impl, case, dtype).items():
            assert tiles or (format, impl, name) == ("low_rank", "triton_streaming", "middle"), (case, name)
            assert len(set(tiles)) == len(tiles), (case, name)
            wrong = [(each, _problem(each, dtype.itemsize)) for each in tiles if _problem(each, dtype.itemsize)]
            assert not wrong, (case, name, wrong[:3])


@each_kernel
def test_candidates_of_a_launch_change_that_launch_alone(needs_triton, format, impl):
    for tokens in (1, 16):
        case = _case(shapes.layers("gpt2s")[0], format, tokens)
        x, *weights = _operands(case, torch.bfloat16)
        y = torch.empty(tokens, case.out_features, dtype=torch.bfloat16, device="meta")

        def launched(config, x=x, weights=weights, y=y):
            return _module(format, impl).launches(x, *weights, None, y, config=config)

        usual, options = launched({}), _tiles(format, impl, case)
        assert len(usual) == len(options)
        for place, (name, tiles) in enumerate(options.items()):
            for each in tiles[:: max(1, len(tiles) // 7)]:
                found = launched({name: each._asdict()})
                same = [before.constants == after.constants for before, after in zip(usual, found, strict=True)]
                assert same[:place] + same[place + 1 :] == [True] * (len(usual) - 1)
                assert found[place].warps == each.warps
                assert found[place].stages == each.stages
                assert found[place].constants["BN"] == each.rows


@each_kernel
def test_some_candidates_are_expected_to_fit_every_card(needs_triton, format, impl):
    """So that an estimate alone never leaves a launch of the paper's layers without any."""
    firsts = [shapes.layers(net)[0] for net in shapes.NETS]
    for case in _cases(format, impl, firsts):
        x, *weights = _operands(case, torch.bfloat16)
        y = torch.empty(case.tokens, case.out_features, dtype=torch.bfloat16, device="meta")
        for place, (name, tiles) in enumerate(_tiles(format, impl, case).items()):
            for card in CARDS if tiles else ():
                assert any(_fits(format, impl, x, weights, y, place, name, each, card) for each in tiles), (case, name)


def _fits(format: str, impl: str, x, weights, y, place: int, name: str, tiles, card: devices.Device) -> bool:
    launch = _module(format, impl).launches(x, *weights, None, y, config={name: tiles._asdict()})[place]
    if launch.kernel.__name__ not in estimate.KERNELS:
        return True
    work = estimate.KERNELS[launch.kernel.__name__](
        launch.constants, launch.programs, x.element_size(), launch.stages, 1
    )
    return math.isfinite(microseconds(work, launch.warps, launch.stages, card))


def test_the_search_on_an_imagined_gpu(run_child, needs_triton):
    run_child("-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_search.py", interpret=True)
