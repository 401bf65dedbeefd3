"""What every algorithm does, against loops over its programs; predictions against times by hand."""

import dataclasses
import doctest
import itertools
import math

import pytest
from blrlab_ops import algorithms, cost, devices
from hypothesis import given
from hypothesis import strategies as st

EVERY = [(format, name) for format, names in algorithms.ALGORITHMS.items() for name in names]
TILE, MIXING = (4, 8), (2, 4)
SIZES = (11, 6, 20, (2, 4), 5)  # n, i, o, (b1, b2), rank: tiles of TILE do not divide them
sizes = st.integers(1, 5)


def _stages(format, name, *arguments, **options):
    return algorithms.stages(format, name, *arguments, **{"tile": TILE, "mixing": MIXING, "itemsize": 1} | options)


def _cut(length, size):
    """The lengths of the pieces of a side."""
    return [min(size, length - start) for start in range(0, length, size)]


def _product(m, k, n, batch=1):
    """Elements that the programs of a batched product load and store, tile by tile."""
    return sum(
        rows * k + k * columns + rows * columns
        for _ in range(batch)
        for rows in _cut(m, TILE[0])
        for columns in _cut(n, TILE[1])
    )


def _rows(sums):
    """The tokens of a fused program: the greatest power of two whose sums fit, from 16 up to the tile's."""
    fitting = [rows for rows in (16, 32, 64, 128, 256) if rows == 16 or rows * sums <= algorithms.ACCUMULATORS]
    return min(TILE[0], max(fitting))


def _loads(name):
    """Elements that the programs of every launch load and store at SIZES."""
    n, i, o, (b1, b2), r = SIZES
    p, q = i // b1, o // b2
    copies = {"Z": 2 * n * b1 * r, "W": 2 * n * b2 * r, "T": 2 * n * b1 * b2 * r, "y": 2 * n * o}
    if name == ("dense", "matmul"):
        return [_product(n, i, o)]
    if name == ("low_rank", "two_stage"):
        return [_product(n, i, r), _product(n, r, o)]
    if name == ("low_rank", "fused"):
        return [sum(rows * i + i * r + r * o + rows * o for rows in _cut(n, _rows(r)))]
    monarch = [_product(n, p, b2 * r, b1), _product(n, b1 * r, q, b2)]
    if name == ("monarch", "plain"):
        return [monarch[0], copies["T"], monarch[1], copies["y"]]
    if name == ("monarch", "two_stage"):
        return monarch
    if name == ("monarch", "fused"):
        return [
            sum(rows * i + b1 * (p * r + r * q) + rows * q for rows in _cut(n, _rows(q)) for _ in range(b2)),
        ]
    mixed = n * b1 * r + b1 * b2 * r + n * b2 * r
    blast = [_product(n, p, r, b1), mixed, _product(n, r, q, b2)]
    if name == ("blast", "plain"):
        return [blast[0], copies["Z"], blast[1], copies["W"], blast[2], copies["y"]]
    if name == ("blast", "three_stage"):
        return blast
    if name == ("blast", "two_stage"):
        tiles = itertools.product(_cut(n, MIXING[0]), _cut(r, MIXING[1]))
        return [sum(rows * i + (i + b1 * b2) * ranks + b2 * rows * ranks for rows, ranks in tiles), blast[2]]
    programs = itertools.product(_cut(n, _rows(q + r)), range(b2))
    chunks = _cut(r, algorithms.RANKS)
    return [
        sum(rows * q + sum(rows * i + (i + b1 + q) * ranks for ranks in chunks) for rows, _ in programs),
    ]


@pytest.mark.parametrize("name", EVERY, ids="-".join)
def test_l2_traffic_is_what_the_programs_load_and_store(name):
    assert [stage.l2_bytes for stage in _stages(*name, *SIZES)] == _loads(name)
    assert [stage.l2_bytes for stage in _stages(*name, *SIZES, itemsize=2)] == [2 * size for size in _loads(name)]


@given(st.sampled_from(EVERY), sizes, sizes, sizes, sizes, sizes, sizes)
def test_the_launches_of_an_algorithm_do_the_work_of_its_format(name, n, b1, b2, p, q, rank):
    arguments = (n, b1 * p, b2 * q, (b1, b2), rank)
    found, counted = _stages(*name, *arguments), cost.cost(name[0], *arguments, itemsize=1)
    assert sum(stage.operand_bytes for stage in found) == counted.bytes_compulsory, "operands move once"
    assert sum(stage.read_bytes for stage in found) == sum(stage.written_bytes for stage in found)
    assert (found[0].read_bytes, found[-1].written_bytes) == (0, 0)
    done = sum(stage.tensor_flops + stage.cuda_flops for stage in found)
    again = 2 * n * b1 * p * rank * (b2 - 1) if name == ("blast", "fused") else 0  # x V for every other output block
    assert done == counted.tensor_flops + counted.cuda_flops + again
    on_cuda = name in (("blast", "two_stage"), ("blast", "fused"))
    assert sum(stage.cuda_flops for stage in found) == (counted.cuda_flops if on_cuda else 0)
    assert not any(stage.again for stage in found), "so small a layer is read once"
    assert all(stage.l2_bytes >= stage.operand_bytes + stage.read_bytes + stage.written_bytes for stage in found)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        (("low_rank", "two_stage"), lambda n, b1, b2, r: n * r),
        (("low_rank", "fused"), lambda n, b1, b2, r: 0),
        (("monarch", "plain"), lambda n, b1, b2, r: 2 * n * b1 * b2 * r + n * 20),  # T twice, and y
        (("monarch", "two_stage"), lambda n, b1, b2, r: n * b1 * b2 * r),
        (("monarch", "fused"), lambda n, b1, b2, r: 0),
        (("blast", "plain"), lambda n, b1, b2, r: 2 * n * (b1 + b2) * r + n * 20),
        (("blast", "three_stage"), lambda n, b1, b2, r: n * (b1 + b2) * r),
        (("blast", "two_stage"), lambda n, b1, b2, r: n * b2 * r),
        (("blast", "fused"), lambda n, b1, b2, r: 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_intermediates_are_written_and_read_once(name, elements):
    n, _, _, (b1, b2), r = SIZES
    found = _stages(*name, *SIZES)
    assert sum(stage.written_bytes for stage in found) == elements(n, b1, b2, r)
    assert sum(stage.dram_bytes(0) - stage.operand_bytes for stage in found) == 2 * elements(n, b1, b2, r)
    assert sum(stage.dram_bytes(10**9) - stage.operand_bytes for stage in found) == 0, "all of it stays in a great L2"


def test_the_l2_keeps_less_of_what_is_larger():
    stage = algorithms.Stage("any", 0, 0, 1000, 300, 400, 0, again=((200, 3),))
    everything = 1000 + 300 + 400 + 3 * 200
    assert stage.dram_bytes(0) == everything
    assert stage.dram_bytes(250) == everything, "0.8 x 250 is the smallest of them"
    assert stage.dram_bytes(500) == 1000 + 300 * 300 // 400 + 400 + 3 * 200 * 200 // 400
    assert stage.dram_bytes(10**9) == 1000


@pytest.mark.parametrize("size", [(300, 70, 2500), (4, 70, 1024), (300, 70, 1025)])
def test_a_library_reads_the_left_side_again_for_every_strip_of_columns(size):
    n, i, o = size
    (found,) = algorithms.stages("dense", "matmul", *size)
    read = sum(2 * n * i for _ in range(0, o, algorithms.STRIP))
    assert found.dram_bytes(0) == read + 2 * (i * o + n * o)


def test_programs_along_rows_read_the_right_side_again_for_every_wave():
    n, i, o, tile = 128 * 100, 64, 128 * 50, (128, 128)
    (found,) = algorithms.stages("dense", "matmul", n, i, o, tile=tile, order="rows")
    rows_at_once = algorithms.WAVE // 50  # of tiles
    waves = math.ceil(100 / rows_at_once)
    assert found.again == ((2 * i * o, waves - 1),)
    (one_token,) = algorithms.stages("dense", "matmul", 1, i, o, tile=tile, order="rows")
    assert one_token.again == ()


def test_whole_tiles_are_executed():
    stage = algorithms.Stage("any", 0, 0, 0, 0, 0, 0)
    assert stage.padded_flops == 0
    (library,), (own,) = (algorithms.stages("dense", "matmul", 65, 33, 129, order=order) for order in algorithms.ORDERS)
    assert library.padded_flops == 2 * 128 * 64 * 256
    assert own.padded_flops == 2 * 128 * 64 * 256
    (library,), (own,) = (algorithms.stages("dense", "matmul", 64, 32, 128, order=order) for order in algorithms.ORDERS)
    assert library.padded_flops == 2 * 64 * 64 * 128
    assert own.padded_flops == 2 * 128 * 32 * 128
    _, mixing, _ = algorithms.stages("blast", "three_stage", 100, 12, 18, (3, 6), 5)
    assert mixing.tensor_flops == 2 * 100 * 5 * 3 * 6
    assert mixing.padded_flops == 2 * 100 * 5 * 64 * 16


def test_counts_of_a_profiler_come_out():
    """Bytes at DRAM and operations on tensor cores that an H100 counted for 4096 x 4096 layers in bfloat16."""
    l2, own = 50 * 2**20, {"tile": (128, 128), "order": "rows"}
    layers = {
        "dense": ((1, 1), 0), "low_rank": ((1, 1), 1024), "monarch": ((16, 16), 64), "blast": ((16, 16), 1024)
    }  # fmt: skip
    counted = [
        (16384, "dense", "matmul", {}, 5.583e11, 7.299e8),
        (16384, "low_rank", "two_stage", {}, 2.749e11, 4.127e8),
        (16384, "low_rank", "two_stage", own, 2.749e11, 3.755e8),
        (16384, "monarch", "two_stage", {}, 2.749e11, 1.360e9),
        (16384, "monarch", "two_stage", own, 2.749e11, 1.519e9),
        (16384, "blast", "three_stage", {}, 3.092e11, 2.434e9),
        (16384, "blast", "two_stage", own, 2.749e11, 1.454e9),
        (1024, "blast", "three_stage", {}, 1.933e10, 1.389e8),
    ]
    for tokens, format, name, options, flops, moved in counted:
        found = algorithms.stages(format, name, tokens, 4096, 4096, *layers[format], **options)
        assert sum(stage.padded_flops for stage in found) == pytest.approx(flops, rel=0.02)
        assert sum(stage.dram_bytes(l2) for stage in found) == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize(
    ("name", "sizes", "rows"),
    [
        (("low_rank", "fused"), (1024, 4096, 4096, (1, 1), 1024), 32),  # 32 x 1024 sums of T
        (("low_rank", "fused"), (1024, 4096, 4096, (1, 1), 4000), 16),  # as few as a product has
        (("monarch", "fused"), (1024, 4096, 4096, (16, 16), 64), 128),  # 128 x 256 sums of an output block
        (("monarch", "fused"), (1024, 4096, 11008, (16, 16), 96), 32),  # 688 wide
        (("blast", "fused"), (1024, 4096, 4096, (16, 16), 1024), 64),  # 256 wide, and 128 ranks
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_fused_program_takes_as_many_tokens_as_its_sums_fit(name, sizes, rows):
    n, i, o, (_, b2), r = sizes
    (found,) = algorithms.stages(*name, *sizes, itemsize=1)
    read_again = {"low_rank": 1, "monarch": b2, "blast": b2 * r // algorithms.RANKS}[name[0]]
    weights = {
        "low_rank": r * (i + o),
        "monarch": r * b2 * (i + o),
        "blast": b2 * i * r + b2 * b2 * r + r * o,
    }[name[0]]
    assert found.l2_bytes == n * i * read_again + weights * n // rows + n * o


def test_programs_of_a_cluster_share_their_loads_of_weights():
    n, i, o = 16, 6, 20
    (alone,), (paired,) = (_stages("dense", "matmul", n, i, o, cluster=size) for size in (1, 2))
    assert alone.l2_bytes - paired.l2_bytes == i * o * (n // TILE[0] - n // (2 * TILE[0]))
    assert algorithms.cluster(devices.get("a40")) == 1
    assert algorithms.cluster(devices.get("h100")) == 2
    unknown = dataclasses.replace(devices.get("h100"), compute_capability=None)
    assert algorithms.cluster(unknown) == 1


@pytest.mark.parametrize("blocks", [1, 2, 3, 9, 16, 64, 128])
def test_the_sums_of_a_mixing_program_fit(blocks):
    tokens, ranks = algorithms.mixing_tile(blocks)
    assert tokens * ranks * blocks <= algorithms.ACCUMULATORS
    assert math.log2(ranks).is_integer()
    assert min(tokens, ranks) >= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("monarch", "three_stage", 1, 8, 8, (2, 2), 1), r"'three_stage' of monarch is not one of \('plain'"),
        (("monrach", "plain", 1, 8, 8, (2, 2), 1), "'monrach' is not one of"),
        (("blast", "plain", 1, 8, 8, (3, 2), 1), "blocks"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        algorithms.stages(*arguments)


def _device(**changed):
    plain = devices.Device("a test", 100e12, 10e12, 1e12, 1000, 1, 1, (8, 0), "made up", l2_bytes_per_s=4e12)
    return dataclasses.replace(plain, **changed)


def test_the_slowest_term_of_every_launch_binds():
    launches = (
        algorithms.Stage("tensor", 300 * 10**6, 10**6, 10**6, 0, 0, 10**6),  # 3, 0.1, 1, 0.25 us
        algorithms.Stage("l2", 0, 0, 10**6, 0, 0, 20 * 10**6),  # 0, 0, 1, 5 us
    )
    found = algorithms.predict(launches, _device())
    assert found.us == pytest.approx(8)
    assert found.term == "l2"
    assert found.terms == pytest.approx({"tensor": 3, "cuda": 0.1, "dram": 2, "l2": 5.25, "launch": 0})
    assert found.dram_bytes == 2 * 10**6
    unknown = algorithms.predict(launches, _device(l2_bytes_per_s=None))
    assert (unknown.us, unknown.term) == (pytest.approx(4), "tensor")
    launched = algorithms.predict(launches, _device(launch_us=10))
    assert (launched.us, launched.term, launched.terms["launch"]) == (pytest.approx(28), "launch", 20)
    in_float32 = algorithms.predict(launches, _device(), "float32")
    assert in_float32.terms["tensor"] == pytest.approx(30.1), "on CUDA cores, with what runs there anyway"


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=list(devices.DEVICES))
@given(
    st.sampled_from(EVERY),
    st.sampled_from([1, 16, 100, 2048]),
    st.sampled_from([1, 2, 16]),
    st.integers(1, 100),
    st.sampled_from([("bfloat16", 2), ("float32", 4)]),
)
def test_no_algorithm_is_faster_than_the_bound(device, name, tokens, blocks, rank, dtype):
    arguments = (tokens, 768, 3072, (blocks, blocks), rank)
    dtype, itemsize = dtype
    found = algorithms.predict(algorithms.stages(*name, *arguments, itemsize=itemsize), device, dtype)
    least = cost.bound_us(cost.cost(name[0], *arguments, itemsize=itemsize), device, dtype)
    assert found.us >= least.us * (1 - 1e-12)


def test_examples():
    failed, attempted = doctest.testmod(algorithms)
    assert attempted
    assert not failed
