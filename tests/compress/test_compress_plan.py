"""Rules over layers: which decides, what it may say, what a 0 stands for, and the sentence for what cannot be."""

import jax
import numpy as np
import pytest

from blrlab import compress
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import gpt2

DEFAULTS = {"format": "monarch", "rank": 0, "blocks": 0, "block_rank": 0}
PAPER_RULES = (("*/attn/c_attn", {}), ("*/mlp/c_fc", {}), ("*/mlp/c_proj", {}))
LAYERS = {
    "h_0/attn/c_attn": (48, 144),
    "h_0/mlp/c_fc": (48, 192),
    "h_0/mlp/c_proj": (192, 48),
    "h_1/mlp/c_fc": (48, 192),
}


def _plan(rules, layers=LAYERS, net="", **defaults):
    return compress.plan(layers, rules, DEFAULTS | {"format": "low_rank", "rank": 8, "blocks": 4} | defaults, net)


def _gpt2_layers(width=768, layers=12):
    return compress.linears(gpt2.parameter_shapes(gpt2.Config(width=width, layers=layers, heads=12)))


def _refused(rules, layers=LAYERS, net="", **defaults):
    with pytest.raises(InputError) as caught:
        _plan(rules, layers, net, **defaults)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _tree(paths):
    """Nest a kernel [3, 4] under every path, in the order given."""
    tree = {}
    for path in paths:
        node = tree
        for name in path.split("/"):
            node = node.setdefault(name, {})
        node["kernel"] = np.zeros((3, 4))
    return tree


@pytest.mark.parametrize(
    "paths",
    [
        ["h_2/a", "h_10/a", "h_10/b", "h_11/a"],
        ["a", "b", "head_1", "head_02", "head_3"],
        ["block/2/mlp", "block/10/mlp"],
        ["2/mlp", "10/mlp"],
        ["2", "10"],
    ],
    ids=str,
)
def test_layers_are_sorted_as_a_reader_counts(paths):
    for order in (paths, paths[::-1], sorted(paths)):
        assert list(compress.linears(_tree(order))) == paths


def test_layers_are_the_two_dimensional_kernels():
    tree = {
        "dense": {"kernel": np.zeros((3, 4)), "bias": np.zeros(4)},
        "conv": {"kernel": np.zeros((2, 3, 4))},
        "factored": {"kernel": {"V": np.zeros((3, 2)), "U": np.zeros((2, 4))}},
        "embed": {"embedding": np.zeros((5, 3))},
        "deep": {"er": {"kernel": jax.ShapeDtypeStruct((5, 6), np.float32)}},
    }
    assert compress.linears(tree) == {"deep/er": (5, 6), "dense": (3, 4)}


def test_layers_of_gpt2():
    layers = _gpt2_layers()
    assert len(layers) == 4 * 12
    assert list(layers)[:4] == ["h_0/attn/c_attn", "h_0/attn/c_proj", "h_0/mlp/c_fc", "h_0/mlp/c_proj"]
    assert list(layers)[-1] == "h_11/mlp/c_proj"
    assert list(layers.values())[:4] == [(768, 2304), (768, 768), (768, 3072), (3072, 768)]


def test_the_first_rule_that_matches_decides():
    specs = _plan([("h_1/*", {"rank": 3}), ("*/c_fc", {"rank": 5}), ("*/c_proj", {})])
    assert [spec.rank for spec in specs.values()] == [5, 8, 3]
    assert list(specs) == ["h_0/mlp/c_fc", "h_0/mlp/c_proj", "h_1/mlp/c_fc"]


def test_specs_are_in_the_models_order_and_unmatched_layers_are_left_out():
    specs = _plan([("h_1/*", {}), ("h_0/mlp/*", {})])
    assert list(specs) == ["h_0/mlp/c_fc", "h_0/mlp/c_proj", "h_1/mlp/c_fc"]
    assert _plan([]) == {}


@pytest.mark.parametrize("pattern", ["h_?/mlp/c_fc", "*c_fc", "h_[01]/mlp/c_fc", "*/mlp/c_f*"])
def test_patterns_are_wildcards_over_the_whole_path(pattern):
    assert list(_plan([(pattern, {})])) == ["h_0/mlp/c_fc", "h_1/mlp/c_fc"]


def test_a_rule_may_be_a_list_as_in_json():
    assert _plan([["*/c_fc", {"blocks": [3, 4], "format": "blast"}]])["h_0/mlp/c_fc"].blocks == (3, 4)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, Spec("low_rank", 48, 192, rank=8)),
        ({"rank": 12}, Spec("low_rank", 48, 192, rank=12)),
        ({"format": "dense"}, Spec("dense", 48, 192)),
        ({"format": "blast"}, Spec("blast", 48, 192, (4, 4), 8)),
        ({"format": "blast", "blocks": 6, "rank": 7}, Spec("blast", 48, 192, (6, 6), 7)),
        ({"format": "blast", "blocks": (3, 8)}, Spec("blast", 48, 192, (3, 8), 8)),
        ({"format": "monarch"}, Spec("monarch", 48, 192, (4, 4), 2)),
        ({"format": "monarch", "rank": 12, "blocks": 3}, Spec("monarch", 48, 192, (3, 3), 4)),
        ({"format": "monarch", "block_rank": 5}, Spec("monarch", 48, 192, (4, 4), 5)),
        ({"format": "monarch", "block_rank": 5, "blocks": (2, 3)}, Spec("monarch", 48, 192, (2, 3), 5)),
    ],
    ids=str,
)
def test_a_rule_overrides_the_defaults(fields, wanted):
    assert _plan([("h_0/mlp/c_fc", fields)]) == {"h_0/mlp/c_fc": wanted}


def test_a_rules_rank_replaces_the_defaults_block_rank_and_the_other_way_round():
    specs = _plan([("*/c_fc", {"rank": 12}), ("*/c_proj", {})], format="monarch", rank=0, block_rank=5)
    assert (specs["h_0/mlp/c_fc"].rank, specs["h_0/mlp/c_proj"].rank) == (3, 5)
    specs = _plan([("*/c_fc", {"block_rank": 5}), ("*/c_proj", {})], format="monarch")
    assert (specs["h_0/mlp/c_fc"].rank, specs["h_0/mlp/c_proj"].rank) == (5, 2)


def test_low_rank_needs_no_blocks():
    """It has none; so nothing published is needed where its rank is given."""
    assert _plan([("*/c_fc", {})], blocks=0)["h_0/mlp/c_fc"] == Spec("low_rank", 48, 192, rank=8)


def test_a_rule_alone_may_say_everything():
    fields = {"format": "blast", "rank": 8, "blocks": 4}
    assert compress.plan({"a": (48, 192)}, [("a", fields)], {}) == {"a": Spec("blast", 48, 192, (4, 4), 8)}


def test_fields_that_neither_the_rule_nor_the_defaults_name_are_the_published_ones():
    specs = compress.plan({"mlp/c_fc": (768, 3072)}, [("mlp/c_fc", {})], {"format": "monarch"}, "gpt2s")
    assert specs == {"mlp/c_fc": Spec("monarch", 768, 3072, (4, 4), 48)}


PUBLISHED = {
    "low_rank": {"blocks": (1, 1), "rank": 192},
    "blast": {"blocks": (6, 6), "rank": 192},
    "monarch": {"blocks": (4, 4), "rank": 48},
}


@pytest.mark.parametrize(("width", "scale"), [(768, 1), (192, 4)])
@pytest.mark.parametrize("format", PUBLISHED)
def test_a_0_is_the_published_value_scaled_with_the_smaller_side(format, width, scale):
    layers = _gpt2_layers(width, 2)
    specs = compress.plan(layers, PAPER_RULES, DEFAULTS | {"format": format}, "gpt2s")
    assert list(specs) == [f"h_{h}/{name}" for h in range(2) for name in ("attn/c_attn", "mlp/c_fc", "mlp/c_proj")]
    wanted = PUBLISHED[format]
    for path, spec in specs.items():
        assert spec == Spec(format, *layers[path], wanted["blocks"], wanted["rank"] // scale)


@pytest.mark.parametrize(
    ("net", "name", "format", "size", "wanted"),
    [
        ("gpt2s", "c_fc", "monarch", (768, 3072), (192, 4)),
        ("gpt2s", "c_fc", "blast", (768, 3072), (192, 6)),
        ("gpt2s", "c_fc", "low_rank", (768, 3072), (192, 1)),
        ("gpt2s", "c_fc", "monarch", (10, 40), (4, 4)),  # 2.5 is no rank: at least one a block
        ("gpt2s", "c_fc", "monarch", (100, 400), (24, 4)),  # 25, to a multiple of the blocks
        ("gpt2s", "c_fc", "low_rank", (100, 400), (25, 1)),
        ("llama7b", "gate_up", "monarch", (4096, 11008), (1536, 16)),
        ("llama7b", "down", "blast", (11008, 4096), (1488, 16)),
        ("vit_b", "fc2", "blast", (3072, 768), (128, 3)),
        ("dit_xl", "qkv", "blast", (1152, 3456), (384, 9)),  # 9 blocks do not divide the rank, and need not
        ("dit_xl", "adaln", "monarch", (1152, 6912), (256, 8)),
    ],
)
def test_published(net, name, format, size, wanted):
    assert compress.published(net, name, format, *size) == wanted


def test_given_blocks_or_rank_keep_the_other_published():
    layer = {"mlp/c_fc": (768, 3072)}
    rules = [("mlp/c_fc", {})]
    assert compress.plan(layer, rules, DEFAULTS | {"blocks": 8}, "gpt2s")["mlp/c_fc"].rank == 192 // 8
    assert compress.plan(layer, rules, DEFAULTS | {"rank": 64}, "gpt2s")["mlp/c_fc"].blocks == (4, 4)
    spec = compress.plan(layer, rules, DEFAULTS | {"block_rank": 10}, "gpt2s")["mlp/c_fc"]
    assert (spec.rank, spec.blocks) == (10, (4, 4))


def test_a_pattern_without_a_layer_asks_whether_another_was_meant():
    sentence = _refused([("h_0/mlp/c_fv", {})])
    assert sentence == 'the rule "h_0/mlp/c_fv" matches no layer. Did you mean "h_0/mlp/c_fc"?'
    assert _refused([("*/nothing", {})]) == 'the rule "*/nothing" matches no layer.'
    assert "matches no layer" in _refused([("c_fc", {})])
    assert "matches no layer" in _refused([("*", {})], layers={})


def test_a_rule_in_the_shadow_of_earlier_ones():
    sentence = _refused([("*/c_fc", {}), ("h_0/*", {}), ("h_?/mlp/*", {})])
    assert sentence == 'the rule "h_?/mlp/*" decides nothing: earlier rules match all of its layers.'


@pytest.mark.parametrize(
    "rule",
    [
        "*/c_fc",
        ("*/c_fc",),
        ("*/c_fc", {}, {}),
        ("*/c_fc", 8),
        ("*/c_fc", None),
        ({}, "*/c_fc"),
        (None, {}),
        None,
        7,
        {"*/c_fc": {}},
        "ab",
    ],
    ids=repr,
)
def test_a_malformed_rule(rule):
    assert "a rule is a pair such as" in _refused([rule])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ranks": 4}, ['unknown field "ranks"', "format, rank, blocks, block_rank", 'Did you mean "rank"?']),
        ({"colour": 4}, ['unknown field "colour"']),
        ({"rank": -1}, ["rank -1", "not a whole number from 0 up"]),
        ({"rank": 1.5}, ["rank 1.5", "not a whole number"]),
        ({"rank": True}, ["rank True", "not a whole number"]),
        ({"rank": "8"}, ["rank '8'", "not a whole number"]),
        ({"rank": None}, ["rank None", "not a whole number"]),
        ({"rank": (4, 4)}, ["rank (4, 4)", "not a whole number"]),
        ({"block_rank": [4, 4]}, ["block_rank [4, 4]"]),
        ({"blocks": (4, 4, 4)}, ["blocks (4, 4, 4)"]),
        ({"blocks": (4, 1.5)}, ["blocks (4, 1.5)"]),
        ({"blocks": "44"}, ["blocks '44'"]),
        ({"format": "monarc"}, ['unknown format "monarc"', "dense, low_rank, monarch, blast", 'mean "monarch"?']),
        ({"format": None}, ["unknown format", "dense, low_rank, monarch, blast"]),
        ({"format": 3}, ["unknown format", "dense, low_rank, monarch, blast"]),
    ],
    ids=str,
)
def test_wrong_fields_are_named(fields, said):
    sentence = _refused([("*/c_fc", fields)])
    assert all(part in sentence for part in said), sentence


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format": "monarch", "rank": 9, "blocks": 4}, ["rank 9", "8 and 12"]),
        ({"format": "monarch", "rank": 8, "blocks": 5}, ["5 input blocks", "1, 2, 3, 4, 6, 8, 12, 16, 24, 48 do"]),
        ({"format": "blast", "blocks": (3, 5)}, ["5 output blocks", "1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64 do"]),
        ({"format": "blast", "blocks": (0, 4)}, ["0 input blocks", "1, 2, 3"]),
        ({"format": "blast", "blocks": (4, -4)}, ["-4 output blocks"]),
        ({"format": "monarch", "rank": 8, "blocks": (2, 4)}, ["not 2 x 4", "block_rank"]),
        ({"format": "monarch", "rank": 8, "block_rank": 2, "blocks": 4}, ["8 and block_rank 2 exclude each other"]),
        ({"format": "blast", "block_rank": 2, "blocks": 4}, ["blast has no block_rank; give rank"]),
        ({"format": "low_rank", "block_rank": 2}, ["low_rank has no block_rank; give rank"]),
        ({"format": "monarch", "rank": 0, "blocks": 4}, ['published for "c_fc" of net ""', "set rank and blocks"]),
        ({"format": "blast", "rank": 8, "blocks": 0}, ["nothing is published"]),
    ],
    ids=str,
)
def test_what_a_layer_cannot_have_names_the_layer_and_what_it_can(fields, said):
    sentence = _refused([("*/mlp/c_fc", fields)])
    assert sentence.startswith("h_0/mlp/c_fc (48 x 192): ")
    assert all(part in sentence for part in said), sentence


@pytest.mark.parametrize(
    "defaults", [{"rank": -1}, {"rank": 2.5}, {"blocks": "4"}, {"format": "monarc"}, {"format": ""}], ids=str
)
def test_wrong_defaults_are_refused_too(defaults):
    _refused([("*/c_fc", {})], **({"format": "monarch", "blocks": 4} | defaults))


def test_defaults_without_a_format():
    with pytest.raises(InputError, match="format"):
        compress.plan(LAYERS, [("*/c_fc", {"rank": 4})], {})


def test_nothing_is_published_for_a_layer_of_other_proportions():
    with pytest.raises(InputError, match="of 3072 x 768, of other proportions: set rank and blocks"):
        compress.published("gpt2s", "c_proj", "monarch", 768, 768)
    with pytest.raises(InputError, match=r"^h_0/attn/c_proj "):
        compress.plan(_gpt2_layers(), [("*/c_proj", {})], DEFAULTS, "gpt2s")


def test_nothing_is_published_for_other_nets_and_layers():
    for net, name in (("gpt3", "c_fc"), ("gpt2s", "fc1"), ("", "c_fc")):
        with pytest.raises(InputError, match=f'"{name}" of net "{net}": set rank and blocks'):
            compress.published(net, name, "monarch", 8, 8)
