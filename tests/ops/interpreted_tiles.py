"""Tests of tile sizes that no rule chooses here, run by test_ops_interpreter.py under TRITON_INTERPRET=1."""

import importlib

import blrlab_ops
import pytest
import torch
from blrlab_ops import budgets, launching, testing
from blrlab_ops.epilogue import Epilogue
from blrlab_ops.testing import Case


def _held(rows: int = 16, columns: int = 32) -> dict:
    return {"rows": rows, "columns": columns, "depth": 16, "warps": 4, "stages": 1, "held": True}


def _product(rows: int, columns: int, depth: int) -> dict:
    return {"rows": rows, "columns": columns, "depth": depth, "warps": 4, "stages": 2}


def _stream(columns: int, depth: int, rows: int = 16) -> dict:
    return {"columns": columns, "depth": depth, "rows": rows, "warps": 4, "stages": 2}


def _vector(columns: int, depth: int) -> dict:
    return _stream(columns, depth, rows=1) | {"vector": True}


def _both(tiles: dict, **more: dict) -> dict:
    return {"first": tiles, "second": tiles, **more}


def _mix(rows: int, ranks: int, tensor: bool) -> dict:
    return {"rows": rows, "ranks": ranks, "warps": 4, "tensor": tensor}


def _chain(rows: int, columns: int, depth: int) -> dict:
    return {"only": {"rows": rows, "columns": columns, "depth": depth, "warps": 4, "stages": 2}}


# (layer, implementation, configuration, what a launch's constants must be for the test to mean anything)
HELD = [
    (Case("low_rank", 21, 192, 70, (1, 1), 48), "triton_two_stage", _both(_held()), ((128, 64), (32, 16))),
    (Case("low_rank", 21, 5, 70, (1, 1), 96), "triton_two_stage", _both(_held(32, 64)), ((16, 0), (64, 32))),
    (Case("monarch", 21, 144, 70, (3, 2), 16), "triton_two_stage", _both(_held()), ((32, 16), (32, 16))),
    (Case("monarch", 21, 15, 70, (3, 2), 31), "triton_two_stage", _both(_held()), ((16, 0), (64, 32))),
    (Case("blast", 21, 96, 70, (2, 5), 24), "triton_three_stage", _both(_held()), ((32, 16), None, (32, 0))),
    (Case("blast", 21, 96, 70, (2, 5), 33), "triton_two_stage", {"second": _held()}, (None, (32, 16))),
    (Case("blast", 21, 192, 70, (1, 2), 20), "triton_late_mixing", {"first": _held()}, ((128, 64), None)),
    (Case("blast", 17, 10, 70, (2, 2), 20), "triton_late_mixing", {"first": _held()}, ((16, 0), None)),
]
PRODUCTS = [
    (Case("low_rank", 37, 50, 70, (1, 1), 33), "triton_two_stage", _both(_product(16, 32, 16))),
    (Case("monarch", 37, 96, 70, (3, 2), 16), "triton_two_stage", _both(_product(32, 16, 32))),  # no tails of depth
    (Case("blast", 37, 50, 70, (2, 5), 33), "triton_three_stage", _both(_product(16, 16, 32))),
    (Case("blast", 37, 50, 70, (2, 5), 33), "triton_late_mixing", {"first": _product(16, 64, 16)}),
]
# One token and several; a depth in one step and in several; columns that no tile divides, of a batch and of a group.
STREAMING = [
    *(
        (Case("low_rank", tokens, in_features, 70, (1, 1), 33), "triton_streaming", _both(tiles))
        for tokens, in_features, tiles in (  # 37 in one part, 34 in two, 51 in three, 96 in six
            (1, 37, _vector(32, 64)),
            (1, 51, _vector(16, 16)),
            (1, 96, _stream(32, 16)),
            (1, 34, _stream(32, 64)),
            (3, 34, _vector(32, 64)),
            (5, 51, _stream(32, 16)),
            (21, 37, _stream(16, 128)),
            (21, 96, _stream(64, 32)),
        )
    ),
    *(
        (Case("monarch", tokens, 69, 70, (3, 2), 12), "triton_streaming", _both(tiles))
        for tokens, tiles in (
            (1, _vector(32, 64)),
            (1, _vector(16, 16)),
            (1, _stream(32, 16)),
            (3, _vector(64, 16)),
            (5, _stream(16, 64)),
            (21, _stream(32, 16)),
        )
    ),
    *(
        (Case("blast", tokens, 69, 70, blocks, 37), "triton_streaming", _both(tiles, middle=middle))
        for tokens, blocks, tiles, middle in (
            (1, (3, 2), _vector(32, 64), _mix(1, 32, False)),
            (1, (3, 5), _vector(8, 16), _mix(16, 16, True)),
            (1, (3, 2), _stream(32, 16), {}),
            (1, (1, 2), _stream(32, 64), {}),
            (3, (3, 5), _vector(32, 16), _mix(2, 32, False)),
            (5, (3, 2), _stream(16, 64), _mix(16, 8, True)),
            (21, (3, 2), _stream(32, 16), _mix(16, 16, False)),
        )
    ),
    *(
        (
            Case("blast", tokens, 69, 70, (3, 5), 37),
            "triton_late_mixing",
            _both(tiles) if tokens < 17 else {"second": tiles},
        )
        for tokens, tiles in ((1, _vector(32, 64)), (3, _vector(16, 16)), (5, _stream(16, 64)), (21, _stream(32, 16)))
    ),
]
MIDDLE = [
    (Case("blast", 5, 30 * blocks[0], 2 * blocks[1], blocks, rank), "triton_three_stage", {"middle": tiles})
    for blocks, rank in (((3, 3), 5), ((3, 2), 37), ((18, 3), 9), ((5, 18), 9))
    for tiles in (_mix(16, 4, True), _mix(32, 16, True), _mix(2, 8, False), _mix(1, 64, False))
]
# What is cut: no rank; 48 = 32 + 16; 130 in chunks of two parts; 300 in chunks of one.
FUSED = [
    (Case("monarch", 21, 3 * p, 2 * 33, (3, 2), rank), "triton_fused", _chain(*tiles), parts)
    for p, rank, tiles, parts in (
        (40, 16, (16, 32, 32), (1, 16, 0)),
        (40, 48, (16, 32, 16), (1, 32, 16)),
        (64, 48, (32, 16, 32), (1, 32, 16)),
        (37, 130, (16, 64, 32), (2, 64, 16)),
        (23, 300, (32, 32, 16), (3, 128, 0)),
    )
]
EVERY = [row[:3] for row in (*HELD, *PRODUCTS, *STREAMING, *MIDDLE, *FUSED)]
GROUPED = [row for row in EVERY if row[0].format == "monarch" and row[1] != "triton_fused"]
IN_DTYPES = [(*row, torch.float32) for row in EVERY] + [(*row, torch.float16) for row in EVERY[::4]]


def _launches(layer: Case, impl: str, config: dict, dtype: torch.dtype = torch.float32, epilogue=None, packed=True):
    module = importlib.import_module(f"blrlab_ops.{layer.format}.{impl}")
    x, factors, bias = testing.random_operands(layer, dtype=dtype)
    weights = module.pack(*factors.values()) if packed else factors.values()
    y = x.new_full((layer.tokens, layer.out_features), float("nan"))
    with testing.poisoned():
        return module.launches(x, *weights, bias, y, epilogue or Epilogue(), config), y


def _run(*arguments, **more) -> torch.Tensor:
    launches, y = _launches(*arguments, **more)
    launching.run(launches, y.device)
    return y


def _id(value) -> str:
    if isinstance(value, Case):
        return "-".join(map(str, value))
    return str(value) if isinstance(value, str | torch.dtype) else ""


@pytest.mark.parametrize(("layer", "impl", "config", "dtype"), IN_DTYPES, ids=_id)
def test_output_is_within_its_budget(layer, impl, config, dtype):
    x, factors, bias = testing.random_operands(layer, dtype=dtype)
    wide = {name: factor.double() for name, factor in factors.items()}
    truth = blrlab_ops.linear(x.double(), wide, bias.double(), impl="ref")
    yardstick = testing.errors(blrlab_ops.linear(x, factors, bias, impl="torch_bmm"), truth)
    allowed = budgets.of_kernel(yardstick, torch.finfo(dtype).eps, testing.peak(truth))
    verdict = testing.Verdict(*testing.errors(_run(layer, impl, config, dtype), truth), *allowed)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("layer", "impl", "config"), [row[:3] for rows in (HELD, STREAMING, FUSED) for row in rows[::3]], ids=_id
)
def test_epilogue_and_repetition(layer, impl, config):
    multiply, residual = torch.randn(2, layer.tokens, layer.out_features)
    follows = Epilogue("gelu", multiply, residual)
    x, factors, bias = testing.random_operands(layer)
    expected = blrlab_ops.linear(x, factors, bias, **follows._asdict(), impl="ref")
    y = _run(layer, impl, config, epilogue=follows)
    torch.testing.assert_close(y, expected)
    assert torch.equal(_run(layer, impl, config, epilogue=follows), y)


@pytest.mark.parametrize(("layer", "impl", "config"), GROUPED, ids=_id)
def test_factors_that_are_not_packed_give_the_same_bits(layer, impl, config):
    """The columns of a Monarch V lie in groups then."""
    launches, _ = _launches(layer, impl, config, packed=False)
    assert launches[0].constants["RIGHT_GROUP"] == layer.rank
    assert torch.equal(_run(layer, impl, config, packed=False), _run(layer, impl, config))


@pytest.mark.parametrize(("layer", "impl", "config", "parts"), HELD, ids=_id)
def test_depth_is_held_in_one_or_two_parts(layer, impl, config, parts):
    launches, _ = _launches(layer, impl, config)
    for launch, held in zip(launches, parts, strict=True):
        if held is not None:
            assert (launch.constants["HELD1"], launch.constants["HELD2"]) == held


@pytest.mark.parametrize(("layer", "impl", "config", "parts"), FUSED, ids=_id)
def test_the_rank_of_a_fused_layer_is_cut(layer, impl, config, parts):
    ((launch,), _) = _launches(layer, impl, config)
    assert tuple(launch.constants[name] for name in ("RANK_CHUNKS", "R1", "R2")) == parts


@pytest.mark.parametrize(("layer", "impl", "config"), STREAMING, ids=_id)
def test_streaming_takes_what_it_is_given(layer, impl, config):
    launches, _ = _launches(layer, impl, config, torch.float16)
    streams = [launch for launch in launches if launch.kernel.__name__ == "stream_kernel"]
    assert len(streams) == len(config.keys() & {"first", "second"})
    for launch, tiles in zip(streams, (config[name] for name in ("first", "second") if name in config), strict=True):
        assert (launch.constants["BC"], launch.constants["BD"]) == (tiles["columns"], tiles["depth"])
        assert launch.constants["VECTOR"] == tiles.get("vector", False)


@pytest.mark.parametrize(("layer", "impl", "config"), STREAMING, ids=_id)
def test_float32_is_summed_in_short_chains(layer, impl, config):
    """Whatever the tiles: one chain down a deep tile would lose digits."""
    launches, _ = _launches(layer, impl, config)
    streams = [launch.constants for launch in launches if "VECTOR" in launch.constants]
    assert all(each["VECTOR"] or each["BD"] <= 32 for each in streams)


def test_streaming_covers_one_step_of_depth_and_several():
    launches = [
        launch for row in STREAMING for launch in _launches(*row, torch.float16)[0] if "VECTOR" in launch.constants
    ]
    seen = {
        (each["VECTOR"], each["DEPTH"] <= each["BD"], each["COLUMNS"] % each["BC"] == 0, each["PARTS"] > 1)
        for each in (launch.constants for launch in launches)
    }
    assert {(vector, once, False, parts) for vector in (0, 1) for once in (0, 1) for parts in (0, 1)} <= seen


@pytest.mark.parametrize(("in_features", "parts"), [(37, 1), (34, 2), (51, 3), (96, 6)])
def test_low_rank_streaming_cuts_the_input(in_features, parts):
    one, _ = _launches(Case("low_rank", 1, in_features, 70, (1, 1), 33), "triton_streaming", {})
    assert [launch.constants["PARTS"] for launch in one] == [1, parts]
    two, _ = _launches(Case("low_rank", 2, in_features, 70, (1, 1), 33), "triton_streaming", {})
    assert [launch.constants["PARTS"] for launch in two] == ([1, parts, 1] if parts > 1 else [1, 1])


@pytest.mark.parametrize(("layer", "impl", "config"), MIDDLE, ids=_id)
def test_the_middle_stage_runs_where_it_is_told(layer, impl, config):
    launches, _ = _launches(layer, impl, config)
    assert launches[1].kernel.__name__ == ("rank_mix_kernel" if config["middle"]["tensor"] else "core_mix_kernel")


def test_a_configuration_of_one_launch_leaves_the_others_to_the_rules():
    layer = Case("low_rank", 21, 192, 70, (1, 1), 48)
    usual, _ = _launches(layer, "triton_two_stage", {})
    given, _ = _launches(layer, "triton_two_stage", {"second": _product(16, 16, 16)})
    assert given[0].constants == usual[0].constants
    assert given[1].constants["BC"] == 16
