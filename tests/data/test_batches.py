"""Batches: every window once an epoch, in an order that a seed gives and a position resumes."""

import itertools
import json

import numpy as np
import pytest

from blrlab.data import Batches, validation_windows
from blrlab.errors import InputError

CONTEXT, BATCH, WINDOWS = 4, 3, 12
TOKENS = np.arange(WINDOWS * CONTEXT + 1 + 2, dtype=np.uint16)  # two tokens over


def stream(seed: int = 0, tokens: np.ndarray = TOKENS) -> Batches:
    return Batches(tokens, CONTEXT, BATCH, seed)


def take(batches: Batches, count: int) -> np.ndarray:
    return np.stack(list(itertools.islice(batches, count)))


def order(batches: Batches, epochs: int = 1) -> list[int]:
    """Say which windows come, by number."""
    return (take(batches, epochs * WINDOWS // BATCH)[:, :, 0].ravel() // CONTEXT).tolist()


def test_a_batch_is_windows_of_following_tokens() -> None:
    batch = next(stream())
    assert batch.shape == (BATCH, CONTEXT + 1)
    assert batch.dtype == np.int32
    assert (batch[:, 0] % CONTEXT == 0).all()
    assert (np.diff(batch, axis=1) == 1).all()


def test_every_window_comes_once_an_epoch() -> None:
    found = order(stream(), epochs=3)
    for epoch in range(3):
        assert sorted(found[epoch * WINDOWS : (epoch + 1) * WINDOWS]) == list(range(WINDOWS))


def test_every_token_but_the_first_is_predicted_once_an_epoch() -> None:
    targets = take(stream(), WINDOWS // BATCH)[:, :, 1:]
    assert sorted(targets.ravel().tolist()) == list(range(1, WINDOWS * CONTEXT + 1))


def test_every_epoch_has_its_own_order() -> None:
    found = order(stream(), epochs=4)
    epochs = {tuple(found[epoch * WINDOWS : (epoch + 1) * WINDOWS]) for epoch in range(4)}
    assert len(epochs) == 4
    assert tuple(range(WINDOWS)) not in epochs


def test_a_batch_goes_on_into_the_next_epoch_where_windows_do_not_divide() -> None:
    tokens = TOKENS[: 5 * CONTEXT + 1]  # 5 windows, batches of 3: 15 windows are 3 epochs and 5 batches
    found = (take(stream(tokens=tokens), 5)[:, :, 0].ravel() // CONTEXT).tolist()
    assert [sorted(found[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3


def test_a_seed_gives_one_stream() -> None:
    streams = {tuple(order(stream(seed), epochs=2)) for seed in (0, 0, 1, 2, 2**31 - 2)}
    assert len(streams) == 4


@pytest.mark.parametrize("taken", [0, 1, 3, WINDOWS // BATCH, 7])
def test_a_position_resumes_the_stream_also_in_another_process(taken: int) -> None:
    whole = take(stream(5), 12)
    first = stream(5)
    for _ in range(taken):
        next(first)
    position = json.loads(json.dumps(first.position))
    assert json.loads(json.dumps(first.position)) == position, "reading a position moves nothing"
    assert np.array_equal(take(first, 12 - taken), whole[taken:])
    resumed = stream(5)
    resumed.position = position
    assert np.array_equal(take(resumed, 12 - taken), whole[taken:])


def test_a_position_goes_back_as_well_as_forth() -> None:
    batches = stream(5)
    position = json.loads(json.dumps(batches.position))
    first = take(batches, 6)
    batches.position = position
    assert np.array_equal(take(batches, 6), first)


def test_tokens_may_stay_on_disk(tmp_path) -> None:
    np.save(tmp_path / "train.npy", TOKENS)
    tokens = np.load(tmp_path / "train.npy", mmap_mode="r")
    assert np.array_equal(take(stream(tokens=tokens), 4), take(stream(), 4))


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (CONTEXT, 0), (3 * CONTEXT, 2)])
def test_a_text_too_short_for_one_batch_is_an_error(tokens: int, windows: int) -> None:
    with pytest.raises(InputError) as caught:
        stream(tokens=TOKENS[:tokens])
    said = f"has {tokens} tokens: {windows} windows of {CONTEXT}, less than one batch of {BATCH}."
    assert str(caught.value).endswith(said)
    assert next(stream(tokens=TOKENS[: 3 * CONTEXT + 1])).shape == (BATCH, CONTEXT + 1)


@pytest.mark.parametrize("most", [1, 2, 3, 5, 11, 12, 13, 1000])
def test_validation_windows_are_spread_evenly(most: int) -> None:
    found = validation_windows(TOKENS, CONTEXT, most)
    assert found.shape == (min(most, WINDOWS), CONTEXT + 1)
    assert found.dtype == np.int32
    assert (np.diff(found, axis=1) == 1).all()
    numbers = found[:, 0] // CONTEXT
    gaps = np.diff(numbers)
    assert (found[:, 0] % CONTEXT == 0).all()
    assert numbers[0] == 0
    if len(numbers) > 1:
        assert numbers[-1] == WINDOWS - 1
        assert gaps.min() >= 1, "no window twice"
        assert gaps.max() - gaps.min() <= 1


def test_a_validation_text_of_one_window_is_enough_and_less_is_an_error() -> None:
    assert validation_windows(TOKENS[: CONTEXT + 1], CONTEXT, 8).tolist() == [list(range(CONTEXT + 1))]
    with pytest.raises(InputError, match=r"has 4 tokens, less than one window of 4 \+ 1"):
        validation_windows(TOKENS[:CONTEXT], CONTEXT, 8)
