"""Training over eight devices gives the losses of one."""

import json

import numpy as np
import pytest

TRAINING = """
import json, sys
from pathlib import Path
import jax, numpy as np
from flax.core import FrozenDict
from blrlab import data, train
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import gpt2

config = gpt2.Config(vocab_size=32, context=8, layers=1, heads=2, width=16, dropout=0.1)
specs = FrozenDict({"h_0/mlp/c_fc": Spec("monarch", 16, 64, (2, 2), 3)})
schedule = train.make_schedule(0.01, 10, 2, 0.1)
optimizer = train.make_optimizer(schedule, 0.1, 1.0)
init = jax.jit(lambda key: train.init_state(gpt2.init(config, key, specs), optimizer, jax.random.key(1)))
step = train.make_step(gpt2.GPT2(config, specs), optimizer)
tokens = np.cumsum(np.random.default_rng(0).integers(1, 3, 600)) % 32

state, batches, alone = init(jax.random.key(0)), data.Batches(tokens, 8, 16, seed=0), []
for _ in range(10):
    state, metrics = step(state, jax.device_put(next(batches), jax.local_devices()[0]))
    alone.append(float(metrics["loss"]))

placed = set()

def watched(state, windows):
    leaf = jax.tree.leaves(state.params)[0]
    part, whole = (array.addressable_shards[0].data.shape for array in (windows, leaf))
    placed.add((part[0], whole == leaf.shape))
    return step(state, windows)

train.fit(
    train.Plan("dense", 10, 16, 1, 100, "abc"), init(jax.random.key(0)), watched,
    data.Batches(tokens, 8, 16, seed=0), schedule, Path(sys.argv[1]), lambda line: None,
)

refused = {}
for batch in (12, 5, 8):
    try:
        train.data_parallel(batch)
    except InputError as error:
        refused[batch] = str(error)
print(json.dumps({"devices": len(jax.devices()), "alone": alone, "placed": list(placed), "refused": refused}))
"""


@pytest.fixture(scope="module")
def eight(child, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What eight devices do: their losses, those of one, where arrays lie, and what is refused."""
    folder = tmp_path_factory.mktemp("eight")
    done = child(TRAINING, folder, devices=8)
    assert done.returncode == 0, done.stderr
    records = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(done.stdout) | {"shared": [json.loads(line)["loss"] for line in records]}


def test_eight_devices_give_the_losses_of_one(eight: dict) -> None:
    assert (eight["devices"], len(eight["alone"])) == (8, 10)
    assert eight["alone"][-1] < eight["alone"][0]
    np.testing.assert_allclose(eight["shared"], eight["alone"], rtol=1e-5)


def test_the_batch_is_cut_between_the_devices_and_the_state_is_on_each(eight: dict) -> None:
    assert eight["placed"] == [[2, True]]


def test_a_batch_that_the_devices_do_not_divide_is_an_error(eight: dict) -> None:
    assert eight["refused"] == {
        "12": "a batch of 12 cannot be shared out over 8 devices; 8 can.",
        "5": "a batch of 5 cannot be shared out over 8 devices; 8 can.",
    }
