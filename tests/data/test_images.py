"""Images: where they come from, how they are split and cut, and what is refused."""

import json

import numpy as np
import pytest

from blrlab.data import images
from blrlab.data.images import ImageBatches, Pictures, held_out
from blrlab.errors import InputError

Image = pytest.importorskip("PIL.Image")


def _folder(root, classes=("cat", "dog"), each=6, size=(40, 30)):
    random = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(0, 40, (size[1], size[0], 3)) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


def _pictures(count=10, size=(20, 16)):
    """Pictures whose red grows to the right and whose green grows downwards."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([across, down, np.zeros_like(down)], -1).astype(np.uint8)
    return Pictures(lambda index: Image.fromarray(pixels), np.arange(count))


def test_digits_are_scikit_learns(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets")
    found = images.prepare(tmp_path, "digits", valid_fraction=0.2)
    given = sklearn.load_digits()
    assert len(found.train) + len(found.valid) == 1797
    assert len(found.valid) == round(0.2 * 1797)
    assert found.summary["classes"] == [str(digit) for digit in range(10)]
    counts = np.bincount(np.concatenate([found.train.labels, found.valid.labels]))
    assert counts.tolist() == np.bincount(given.target).tolist()
    picture, label = found.train[0]
    first = next(at for at in range(1797) if np.array_equal(np.round(given.images[at] * 255 / 16), np.asarray(picture)))
    assert label == given.target[first]


def test_preparing_again_gives_the_same(tmp_path):
    pytest.importorskip("sklearn.datasets")
    one, other = (images.prepare(tmp_path / name, "digits", valid_fraction=0.2) for name in ("one", "other"))
    assert one.summary == other.summary
    assert np.array_equal(one.valid.labels, other.valid.labels)
    assert images.prepare(tmp_path / "less", "digits", valid_fraction=0.1).summary["hash"] != one.summary["hash"]


def test_a_folder_of_classes_is_split(tmp_path):
    found = images.prepare(tmp_path / "data", "folder", path=str(_folder(tmp_path / "pets")), valid_fraction=0.25)
    assert found.summary["classes"] == ["cat", "dog"]
    assert (len(found.train), len(found.valid)) == (9, 3)
    for part in (found.train, found.valid):
        for picture, label in (part[index] for index in range(len(part))):
            assert (np.asarray(picture).mean() > 70) == bool(label)


def test_train_and_val_are_taken_as_they_are(tmp_path):
    _folder(tmp_path / "pets" / "train", each=4)
    _folder(tmp_path / "pets" / "val", each=2)
    found = images.prepare(tmp_path / "data", "folder", path=str(tmp_path / "pets"))
    assert (len(found.train), len(found.valid)) == (8, 4)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda root: root.mkdir(), "has no classes"),
        (lambda root: (root / "cat").mkdir(parents=True), "has no image"),
        (lambda root: None, "no folder of images at"),
        (lambda root: _folder(root, ("cat",), 1), "has one image"),
        (
            lambda root: (_folder(root / "train", ("cat",)), _folder(root / "val", ("cat", "dog"))),
            "has the class dog, which",
        ),
    ],
    ids=["no classes", "no images", "no folder", "one image", "a class to test alone"],
)
def test_folders_that_do_not_do(tmp_path, build, said):
    build(tmp_path / "pets")
    with pytest.raises(InputError, match=said):
        images.prepare(tmp_path / "data", "folder", path=str(tmp_path / "pets"))


def test_an_unknown_source(tmp_path):
    with pytest.raises(InputError, match='Did you mean "digits"'):
        images.prepare(tmp_path, "digit")


def test_a_broken_picture_is_named(tmp_path):
    root = _folder(tmp_path / "pets")
    (root / "cat" / "0.png").write_bytes(b"no picture")
    found = images.prepare(tmp_path / "data", "folder", path=str(root), valid_fraction=0.25)
    with pytest.raises(InputError, match=r"0.png cannot be read as an image"):
        [part[index] for part in (found.train, found.valid) for index in range(len(part))]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"source": "digits"}', '{"source": "moon x"}'])
def test_damaged_data_is_said(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(InputError, match="are damaged"):
        images.load(tmp_path)


def test_a_hugging_face_dataset_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(np.full((8, 8), 20 * index, np.uint8)) for index in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["low", "high"])})
    made = {
        side: datasets.Dataset.from_dict(
            {"image": pictures[start::2], "label": [int(index > 2) for index in range(start, 6, 2)]}, features=features
        )
        for side, start in (("train", 0), ("validation", 1))
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: datasets.DatasetDict(made))
    found = images.prepare(tmp_path, "huggingface", name="some/pictures")
    assert found.summary["classes"] == ["low", "high"]
    picture, label = found.valid[1]
    assert (np.asarray(picture).max(), label) == (60, 1)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: datasets.DatasetDict({"train": made["train"]}))
    with pytest.raises(InputError, match="has no validation split"):
        images.prepare(tmp_path / "other", "huggingface", name="some/pictures")


def test_the_whole_picture_is_seen_where_nothing_is_cut():
    batch = next(ImageBatches(_pictures(), 8, 3, batch=4, seed=0, smallest=1.0, flip=False, workers=1))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["image"].dtype == np.float32
    red, green = batch["image"][0, :, :, 0], batch["image"][0, :, :, 1]
    assert (np.diff(red, axis=1) > 0).all()
    assert (np.diff(green, axis=0) > 0).all()
    assert red.min() < -0.8
    assert red.max() > 0.8
    assert np.ptp(red, axis=0).max() < 0.02


def test_cuts_are_drawn_and_turned():
    batches = ImageBatches(_pictures(64), 8, 3, batch=64, seed=0, smallest=0.2, flip=True, workers=1)
    found = next(batches)["image"]
    spans = np.abs(found[:, :, -1, 0] - found[:, :, 0, 0]).mean(axis=1) / 2 * 20 / 19
    assert spans.min() > 0.3
    assert spans.max() > 0.7
    assert spans.std() > 0.05
    turned = (found[:, 0, -1, 0] < found[:, 0, 0, 0]).mean()
    assert 0.3 < turned < 0.7


def test_batches_go_on_where_they_stood():
    def start():
        return ImageBatches(_pictures(12), 8, 1, batch=4, seed=3, smallest=0.3, workers=2)

    whole = start()
    wanted = [next(whole) for _ in range(6)]
    part = start()
    for _ in range(2):
        next(part)
    position = json.loads(json.dumps(part.position))
    again = start()
    again.position = position
    for index in range(2, 6):
        found = next(again)
        assert np.array_equal(found["label"], wanted[index]["label"])
        assert np.array_equal(found["image"], wanted[index]["image"])
    labels = np.concatenate([batch["label"] for batch in wanted[:3]])
    assert sorted(labels.tolist()) == list(range(12))


def test_too_few_images_for_a_batch():
    with pytest.raises(InputError, match="there are 3 training images, less than one batch of 4"):
        ImageBatches(_pictures(3), 8, 3, batch=4, seed=0)


def test_evaluation_sees_the_middle():
    large = held_out(_pictures(9, size=(200, 100)), 16, 3, most=4)
    assert large["image"].shape == (4, 16, 16, 3)
    assert large["label"].tolist() == [0, 2, 5, 8]
    # The middle 87.5 of 100 rows, and as many of 200 columns.
    red = large["image"][0, :, :, 0].mean(axis=0)
    assert np.ptp(red) == pytest.approx(2 * 87.5 / 199 * 15 / 16, rel=0.05)
    small = held_out(_pictures(3, size=(8, 8)), 8, 1, most=10)
    assert small["image"].shape == (3, 8, 8, 1)


def test_there_is_something_to_evaluate_on():
    with pytest.raises(InputError, match="no image is held out"):
        held_out(_pictures(0), 8, 3, most=4)


def test_the_middle_is_cut_out_where_a_margin_is_given():
    """Red grows to the right over 200 pixels: of the 100 in the middle half is 3/8 to 5/8 of it."""
    pictures = _pictures(10, (200, 100))
    for margin, low, high in ((0.5, 75, 125), (1.0, 50, 150)):
        given = next(ImageBatches(pictures, 8, 3, 4, seed=0, flip=False, margin=margin))["image"][..., 0]
        kept = held_out(pictures, 8, 3, 4, margin)["image"][..., 0]
        np.testing.assert_array_equal(given, kept)
        share = (given + 1) / 2
        assert share[:, :, 0].max() == pytest.approx(low / 200, abs=0.06)
        assert share[:, :, -1].min() == pytest.approx(high / 200, abs=0.06)
