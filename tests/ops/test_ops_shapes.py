"""Named shapes: the published ones as published, this project's own by their recipe."""

import doctest

import pytest
from blrlab_ops import cost, shapes

OWN = [layer for layer in shapes.LAYERS if not layer.published]
PUBLISHED = [layer for layer in shapes.LAYERS if layer.published]


def _id(layer):
    return f"{layer.net}-{layer.name}"


def test_published_nets_come_first():
    assert shapes.NETS[:5] == ("llama7b", "llama1b", "gpt2s", "vit_b", "dit_xl")
    assert {layer.net for layer in PUBLISHED} == set(shapes.NETS[:5])
    assert {layer.net for layer in OWN} == {"qwen25_7b", "mistral_7b", "llama3_8b", "gemma2_9b"}


def test_names_are_unique_within_a_net():
    names = [(layer.net, layer.name) for layer in shapes.LAYERS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("layer", shapes.LAYERS, ids=_id)
def test_every_choice_is_a_layer_smaller_than_dense(layer):
    dense = cost.params("dense", layer.in_features, layer.out_features)
    for format in ("low_rank", "monarch", "blast"):
        rank, blocks = layer.choice(format)
        assert format != "monarch" or rank % blocks == 0
        kernel_rank = rank // blocks if format == "monarch" else rank
        assert cost.params(format, layer.in_features, layer.out_features, (blocks, blocks), kernel_rank) < dense
    assert layer.choice("dense") == (0, 1)


def _recipe(i, o):
    """Ranks at half the parameters: low rank down to a multiple of 16, r' of 16 Monarch blocks to the nearest."""
    half = i * o / (2 * (i + o))
    return 16 * int(half // 16), 16 * 16 * round(half / 16 / 16)


@pytest.mark.parametrize("layer", OWN + [layer for layer in PUBLISHED if layer.net == "llama7b"], ids=_id)
def test_own_ranks_follow_the_recipe_of_llama7b(layer):
    assert (layer.rank, layer.monarch_rank) == _recipe(layer.in_features, layer.out_features)
    assert (layer.blast_blocks, layer.monarch_blocks, layer.tokens) == (16, 16, 1024)


@pytest.mark.parametrize("net", ["qwen25_7b", "mistral_7b", "llama3_8b", "gemma2_9b"])
def test_down_turns_gate_and_up_around(net):
    gate_up, down = shapes.layers(net)
    assert (gate_up.name, down.name) == ("gate_up", "down")
    assert (gate_up.in_features, gate_up.out_features) == (down.out_features, down.in_features)


def test_an_unknown_net_is_told_the_nearest():
    with pytest.raises(
        ValueError, match=r'unknown net "qwen2_7b": it is one of llama7b, .*\. Did you mean "qwen25_7b"'
    ):
        shapes.layers("qwen2_7b")


def test_an_unknown_format_is_a_key_error():
    with pytest.raises(KeyError):
        shapes.LAYERS[0].choice("dens")


def test_examples():
    failed, attempted = doctest.testmod(shapes)
    assert attempted
    assert not failed
