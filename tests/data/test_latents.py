"""Latents in class folders: what is read, how it is split, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from blrlab.data import latents
from blrlab.errors import InputError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write(root, classes=("cat", "dog"), each=5, shape=(4, 3, 3)):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            np.save(root / name / f"{index}.npy", draw(*shape, seed=index) + 10 * label)
    return root


def numbers(part):
    return sorted((label, float(image.sum())) for image, label in (part[index] for index in range(len(part))))


def test_a_folder_of_classes_is_split_and_scaled(tmp_path):
    found = latents.prepare(tmp_path / "data", str(write(tmp_path / "pets")), 0.2)
    assert found.summary["classes"] == ["cat", "dog"]
    assert (len(found.train), len(found.valid), found.summary["shape"]) == (8, 2, [4, 3, 3])
    assert latents.prepared(tmp_path / "data")
    wanted = sorted((label, float((draw(4, 3, 3, seed=i) + 10 * label).sum())) for label in (0, 1) for i in range(5))
    np.testing.assert_allclose(sorted(numbers(found.train) + numbers(found.valid)), wanted, rtol=1e-5)
    kept = latents.held_out(found.valid, 10, scale=0.5)
    assert kept["image"].shape == (2, 3, 3, 4)
    np.testing.assert_allclose(kept["image"][0], np.moveaxis(found.valid[0][0], 0, -1) * 0.5)


def test_all_kinds_of_files_are_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    rows = draw(6, 2, 4, 4)
    np.save(tmp_path / "pets" / "cat" / "stack.npy", rows[:2])
    np.savez(tmp_path / "pets" / "cat" / "both.npz", one=rows[2], more=rows[3:4])
    save_file({"x": rows[4], "y": rows[5].astype(np.float16)}, tmp_path / "pets" / "dog" / "two.safetensors")
    found = latents.prepare(tmp_path / "data", str(tmp_path / "pets"), 0.3)
    assert (len(found.train), len(found.valid), found.summary["files"]) == (4, 2, 3)
    read = numbers(found.train) + numbers(found.valid)
    wanted = [(int(row > 3), float(rows[row].sum())) for row in range(6)]
    np.testing.assert_allclose(sorted(read), sorted(wanted), atol=2e-2)
    assert all(found.train[index][0].dtype == np.float32 for index in range(4))


def test_train_and_val_are_taken_as_they_are(tmp_path):
    write(tmp_path / "pets" / "train", each=3)
    write(tmp_path / "pets" / "val", each=1)
    found = latents.prepare(tmp_path / "data", str(tmp_path / "pets"))
    assert (len(found.train), len(found.valid)) == (6, 2)


def test_batches_are_shuffled_scaled_and_resumed(tmp_path):
    found = latents.prepare(tmp_path / "data", str(write(tmp_path / "pets")), 0.2)
    stream = latents.LatentBatches(found.train, 4, seed=1, scale=2.0)
    first = next(stream)
    assert first["image"].shape == (4, 3, 3, 4)
    assert first["image"].dtype == np.float32
    assert all((image.mean() > 10) == bool(label) for image, label in zip(first["image"], first["label"], strict=True))
    position, wanted = stream.position, [next(stream) for _ in range(3)]
    again = latents.LatentBatches(found.train, 4, seed=1, scale=2.0)
    again.position = position
    for batch in wanted:
        np.testing.assert_array_equal(next(again)["image"], batch["image"])
    assert (stream.unit, stream.units) == ("image", 1)


def test_preparing_again_gives_the_same_and_another_split_another_hash(tmp_path):
    root = str(write(tmp_path / "pets"))
    one, other = (latents.prepare(tmp_path / name, root, 0.2).summary for name in ("one", "other"))
    assert one == other
    assert latents.prepare(tmp_path / "more", root, 0.4).summary["hash"] != one["hash"]


def _wrong(root, array, name="0.npy"):
    write(root)
    np.save(root / "cat" / name, array)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda root: None, "no folder of latents at"),
        (lambda root: root.mkdir(), "has no classes: it should hold a folder of latents"),
        (lambda root: (root / "cat").mkdir(parents=True), r"has no latent \(.npy, .npz, .safetensors\)"),
        (lambda root: write(root, ("cat",), 1), "has one latent"),
        (lambda root: (write(root / "train", ("cat",)), write(root / "val")), "has the class dog, which"),
        (lambda root: _wrong(root, draw(3, 4)), r"holds float32 \[3, 4\]; latents are floats \[C, h, h\]"),
        (lambda root: _wrong(root, draw(4, 3, 5)), "latents are floats"),
        (lambda root: _wrong(root, np.zeros((4, 3, 3), np.int64)), "holds int64"),
        (lambda root: _wrong(root, draw(4, 5, 5)), r"\[4, 5, 5\].*: they must be alike"),
        (lambda root: (write(root), (root / "cat" / "0.npy").write_bytes(b"\x93NUMPY?")), "cannot be read as latents"),
        (lambda root: (write(root), (root / "cat" / "0.safetensors").write_bytes(b"no")), "cannot be read as latents"),
        (lambda root: (write(root, each=1), [np.save(f, draw(0, 4, 3, 3)) for f in root.rglob("*.npy")]), "no latent"),
    ],
)
def test_latents_that_cannot_be(tmp_path, build, said):
    build(tmp_path / "pets")
    with pytest.raises(InputError, match=said):
        latents.prepare(tmp_path / "data", str(tmp_path / "pets"))


def test_too_few_latents_and_damage(tmp_path):
    found = latents.prepare(tmp_path / "data", str(write(tmp_path / "pets")), 0.2)
    with pytest.raises(InputError, match="8 training latents, less than one batch of 9"):
        latents.LatentBatches(found.train, 9, seed=0)
    (tmp_path / "data" / latents.LISTED).write_text("{}")
    with pytest.raises(InputError, match="are damaged"):
        latents.load(tmp_path / "data")
