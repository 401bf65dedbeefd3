"""Latents in class folders: what is read, how it is split, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from blrlab.data import latent_files, latents
from blrlab.errors import InputError


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write(root, classes=("cat", "dog"), each=5, shape=(4, 3, 3)):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            np.save(root / name / f"{index}.npy", draw(*shape, seed=index) + 10 * label)
    return root


PAIR = draw(2, 4, 3, 3)


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
    np.savez(tmp_path / "pets" / "cat" / "one.npz", x=rows[2])
    np.savez(tmp_path / "pets" / "cat" / "stack_of_one.npz", x=rows[3:4])
    save_file({"x": rows[4]}, tmp_path / "pets" / "dog" / "one.safetensors")
    save_file({"x": rows[5:].astype(np.float16)}, tmp_path / "pets" / "dog" / "stack.SAFETENSORS")
    found = latents.prepare(tmp_path / "data", str(tmp_path / "pets"), 0.3)
    assert (len(found.train), len(found.valid), found.summary["files"]) == (4, 2, 5)
    read = numbers(found.train) + numbers(found.valid)
    wanted = [(int(row > 3), float(rows[row].sum())) for row in range(6)]
    np.testing.assert_allclose(sorted(read), sorted(wanted), atol=2e-2)
    assert all(found.train[index][0].dtype == np.float32 for index in range(4))


def test_train_and_val_are_taken_as_they_are(tmp_path):
    write(tmp_path / "pets" / "train", each=3)
    write(tmp_path / "pets" / "val", each=1)
    found = latents.prepare(tmp_path / "data", str(tmp_path / "pets"))
    assert (len(found.train), len(found.valid)) == (6, 2)


@pytest.mark.parametrize("rows", [1, 8])
def test_an_image_and_its_mirror_are_on_one_side(tmp_path, rows):
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    for number in range(8 // rows):
        stack = draw(rows, 4, 3, 3, seed=number)
        both = {"latent": stack, "latent_flip": stack[..., ::-1].copy()}
        # A cache of single images has them with and without an axis of one.
        both = both if rows > 1 or number % 2 else {**both, "latent": both["latent"][0]}
        save_file(both, tmp_path / "pets" / "cat" / f"{number}.safetensors")
    found = latents.prepare(tmp_path / "data", str(tmp_path / "pets"), 0.4)
    assert (len(found.train), len(found.valid)) == (10, 6)
    seen = [
        {float(np.float32(np.abs(part[i][0]).max())) for i in range(len(part))} for part in (found.train, found.valid)
    ]
    assert [len(each) for each in seen] == [5, 3]
    assert not seen[0] & seen[1]


def test_of_a_stack_one_row_is_read(tmp_path, monkeypatch):
    """A slice that counts what it is asked for stands in the place of safetensors' own."""
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    stack = draw(6, 4, 3, 3)
    save_file({"x": stack}, tmp_path / "pets" / "cat" / "stack.safetensors")
    asked, opened = [], latent_files._mapped

    class Slice:
        def __init__(self, stored):
            self.get_shape, self.get_dtype, self.stored = stored.get_shape, stored.get_dtype, stored

        def __getitem__(self, key):
            asked.append(key)
            return self.stored[key]

    monkeypatch.setattr(latent_files, "_mapped", lambda file: {n: Slice(s) for n, s in opened(file).items()})
    found = latents.prepare(tmp_path / "data", str(tmp_path / "pets"), 0.2)
    assert asked == []
    row = found.train.places[2][-1]
    np.testing.assert_array_equal(found.train[2][0], stack[row])
    assert asked == [row]


def test_some_of_the_latents(tmp_path):
    part = latents.prepare(tmp_path / "data", str(write(tmp_path / "pets")), 0.2).train
    some = part.at([5, 1])
    assert len(some) == 2
    for index, (image, label) in zip((5, 1), (some[0], some[1]), strict=True):
        np.testing.assert_array_equal(image, part[index][0])
        assert label == part[index][1]


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


@pytest.mark.parametrize("suffix", ["npy", "npz", "safetensors"])
def test_other_latents_of_the_same_name_and_size_have_another_hash(tmp_path, suffix):
    hashes, sizes = set(), set()
    for number, kept in enumerate((0, 0, 2)):
        root = tmp_path / str(number) / "pets"
        (root / "cat").mkdir(parents=True)
        for index in range(4):
            array, file = draw(4, 32, 32, seed=index + kept), root / "cat" / f"{index}.{suffix}"
            {"npy": np.save, "npz": np.savez, "safetensors": lambda file, x: save_file({"x": x}, file)}[suffix](
                file, array
            )
            sizes.add(file.stat().st_size)
        hashes.add(latents.prepare(tmp_path / str(number) / "data", str(root), 0.3).summary["hash"])
    assert (len(hashes), len(sizes)) == (2, 1)


def test_both_ends_of_a_file_tell_it_apart(tmp_path):
    content = bytearray(3 * latent_files.END)
    for at in (None, 0, len(content) - 1):
        changed = bytearray(content)
        if at is not None:
            changed[at] = 1
        (tmp_path / "file").write_bytes(changed)
        assert latent_files.ends(str(tmp_path / "file")) == changed[: latent_files.END] + changed[-latent_files.END :]
    (tmp_path / "file").write_bytes(b"short")
    assert latent_files.ends(str(tmp_path / "file")) == b"short"


def _damaged(root, change):
    """Write a compressed .npz whose bytes were changed."""
    write(root)
    np.savez_compressed(root / "cat" / "0.npz", x=draw(4, 16, 16))
    (root / "cat" / "0.npz").write_bytes(change(bytearray((root / "cat" / "0.npz").read_bytes())))


def _cut(content):
    return content[: len(content) // 2]


def _broken(content):
    return content[:600] + bytes(64) + content[664:]


def _renamed(root):
    write(root)
    np.savez(root / "cat" / "x.npz", x=draw(4, 3, 3))
    (root / "cat" / "x.npz").rename(root / "cat" / "x.npy")


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
        (lambda root: _damaged(root, _cut), "0.npz cannot be read as latents: File is not a zip"),
        (lambda root: _damaged(root, _broken), "0.npz cannot be read as latents: (Error -3|Bad CRC)"),
        (_renamed, "x.npy cannot be read as latents"),
        (
            lambda root: (write(root), np.savez(root / "cat" / "0.npz", x=draw(2, 4, 3, 3))),
            "0.npz holds a stack of 2 latents; stacks are read of .npy or .safetensors",
        ),
        (
            lambda root: ((root / "cat").mkdir(parents=True), np.savez(root / "cat" / "0.npz", a=PAIR[0], b=PAIR[1])),
            "has one latent",
        ),
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
