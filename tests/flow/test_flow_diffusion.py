"""An experiment on DiT: from images or latents to samples and a report, tiny; what it draws, and what it refuses."""

import json
import shutil
import sys
import types

import jax
import numpy as np
import pytest

from blrlab import records, train
from blrlab.data import images
from blrlab.experiments import build, command, fid, run, sample_stage, workdir
from blrlab.experiments.decoding import pixels
from blrlab.models import dit, hf

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")

TINY = {
    "model.width": 24,
    "model.inner": 48,
    "model.layers": 1,
    "model.heads": 2,
    "model.patch": 4,
    "train.steps": 6,
    "train.batch": 8,
    "train.warmup": 1,
    "train.log_every": 2,
    "train.checkpoint_every": 2,
    "train.ema": 0.5,
    "heal.steps": 4,
    "heal.batch": 8,
    "heal.warmup": 1,
    "heal.log_every": 2,
    "heal.checkpoint_every": 2,
    "heal.ema": 0.5,
    "compress.windows": 48,
    "compress.batch": 24,
    "eval.windows": 20,
    "eval.batch": 8,
    "sample.each": 2,
    "sample.batch": 16,
    "sample.steps": 3,
    "factors.blocks": 2,
    "factors.rank": 4,
    "bench.impls": "xla",
    "bench.nets": "own",
    "bench.seconds": 0.001,
}


def flags(config="dit_xl_monarch", **fields):
    given = TINY | fields
    return [f"--config=configs/{config}.py:small", *(f"--config.{name}={value}" for name, value in given.items())]


def rows(folder, kind):
    return [row for row in records.read(folder / "records.jsonl") if row["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "run"
    assert run.main([*flags(), f"--workdir={folder}"]) == 0
    return folder


def test_a_run_leaves_records_samples_and_a_report(finished):
    found = {(row["stage"], row["metric"]): row for row in rows(finished, "eval")}
    stages = ("dense", "dense_continued", "compressed", "healed")
    assert set(found) == {(stage, metric) for stage in stages for metric in ("loss", "mse", "vb")}
    for stage in stages:
        loss, mse, vb = (found[stage, metric]["value"] for metric in ("loss", "mse", "vb"))
        assert loss == pytest.approx(mse + vb, rel=1e-5)
        assert found[stage, "loss"]["examples"] == 20
    assert [row["path"] for row in rows(finished, "compress")] == [
        "blocks_0/adaln", "blocks_0/attn/qkv", "blocks_0/mlp/fc1", "*",
    ]  # fmt: skip
    assert all("images_per_s" in row for row in rows(finished, "train"))
    page = (finished / "report.html").read_text()
    assert "bits/value" in page
    assert "loss (mse + T/1000 vb)" in page


def test_the_bound_is_weighed_by_the_steps_of_the_noise(tmp_path):
    given = flags(stages="data,dense,eval", **{"noise.steps": 500})
    assert run.main([*given, f"--workdir={tmp_path / 'run'}"]) == 0
    found = {row["metric"]: row for row in rows(tmp_path / "run", "eval")}
    loss, mse, vb = (found[metric]["value"] for metric in ("loss", "mse", "vb"))
    assert loss == pytest.approx(mse + 0.5 * vb, rel=1e-5)
    assert found["loss"]["unit"] == "mse + T/1000 vb"


def _hash(folder, **fields):
    config = command.load(flags(**fields))[0]
    made = build.experiment(config)
    folder.mkdir()
    made.task.prepare(made, folder)
    return made.task.load(folder).summary["hash"]


def test_what_changes_a_loss_changes_the_hash_of_its_data(tmp_path):
    sizes = {"model.channels": 3, "model.out_channels": 6}
    changes = ({}, {"noise.steps": 500}, {"noise.first": 2e-4}, {"noise.last": 0.03}, {"model.size": 16}, sizes)
    of_pictures = [_hash(tmp_path / str(number), **fields) for number, fields in enumerate(changes)]
    assert len(set(of_pictures)) == len(changes)
    assert _hash(tmp_path / "again", **{"noise.dropped": 0.5, "data.scale": 0.1}) == of_pictures[0]
    assert images.prepare(tmp_path / "images", "digits", valid_fraction=0.2).summary["hash"] not in of_pictures
    given = {**LATENTS, "data.path": _latents(tmp_path / "pets")}
    scales = [_hash(tmp_path / f"of {scale}", **{**given, "data.scale": scale}) for scale in (0.5, 1.0)]
    assert scales[0] != scales[1]


def test_other_noise_is_other_data(finished, tmp_path, capsys):
    """The hash is written with the data, so they are prepared anew; under a model they stay as they are."""
    folder, hashes = tmp_path / "run", []
    for steps in (1000, 500):
        assert run.main([*flags(stages="data", **{"noise.steps": steps}), f"--workdir={folder}"]) == 0
        hashes.append(images.load(folder / "data").summary["hash"])
    assert hashes[0] != hashes[1]
    assert "noise.steps: 1000 -> 500: running again from data on" in capsys.readouterr().out
    assert run.main([*flags(**{"noise.steps": 500}), f"--workdir={finished}"]) == 2
    assert "holds a dense model made otherwise (noise.steps: 1000 -> 500):" in capsys.readouterr().err


def test_all_models_draw_from_the_same_noise(finished):
    drawn = np.load(finished / "sample" / "samples.npz")
    assert drawn["label"].tolist() == [label for label in range(10) for _ in range(2)]
    assert set(drawn) == {"label", "dense", "dense_continued", "compressed", "healed"}
    for name in set(drawn) - {"label"}:
        assert drawn[name].shape == (20, 8, 8, 1)
        assert np.isfinite(drawn[name]).all()
    # Six steps leave the model near its start, which foresees the same from the same noise.
    apart = np.abs(drawn["dense"] - drawn["compressed"]).mean()
    assert 0 < apart < 0.5 * np.abs(drawn["dense"] - np.roll(drawn["dense"], 1, axis=0)).mean()
    with Image.open(finished / "sample" / "samples.png") as sheet:
        assert sheet.size == (34 + 4 * (2 * 50 + 12), 18 + 10 * 50)


def test_many_images_are_drawn_and_some_of_them_shown(finished, monkeypatch, capsys):
    monkeypatch.setattr(sample_stage, "SHOWN", (2, 3))
    given = flags(**{"sample.each": 5, "sample.steps": 1, "sample.labels": "3,7,9", "stages": "sample"})
    assert run.main([*given, f"--workdir={finished}"]) == 0
    assert "6 of 15, a row for each class" in capsys.readouterr().out
    drawn = np.load(finished / "sample" / "samples.npz")
    assert drawn["dense"].shape == (15, 8, 8, 1)
    with Image.open(finished / "sample" / "samples.png") as sheet:
        assert sheet.size == (34 + 4 * (3 * 50 + 12), 18 + 2 * 50)
        third = np.asarray(sheet)[18 + 50 : 18 + 50 + 48 : 6, 34 + 100 : 34 + 100 + 48 : 6]
    np.testing.assert_array_equal(third, pixels(drawn["dense"][5 + 2]))


def test_a_change_of_sampling_draws_again_and_trains_nothing(finished, capsys):
    changed = flags(**{"sample.sampler": "ddim", "sample.guidance": 1, "sample.labels": "3, 7", "stages": "sample"})
    before = (finished / "sample" / "samples.png").read_bytes()
    assert run.main([*changed, f"--workdir={finished}"]) == 0
    out = capsys.readouterr().out
    assert "running again from sample on" in out
    assert "step 6/6" not in out
    assert np.load(finished / "sample" / "samples.npz")["label"].tolist() == [3, 3, 7, 7]
    assert (finished / "sample" / "samples.png").read_bytes() != before


def test_a_killed_healing_goes_on_to_the_same_average(finished, tmp_path, monkeypatch, capsys):
    """The average is what is saved, so a result of the same bits means that it was restored."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "heal")
    arguments = [*flags(stages="heal"), f"--workdir={copy}"]
    append = records.append

    def killed(path, row):
        append(path, row)
        if row["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("blrlab.records.append", killed)
    assert run.main(arguments) == run.EXIT_STOPPED
    assert "heal: done" not in capsys.readouterr().out
    monkeypatch.setattr("blrlab.records.append", append)
    assert run.main(arguments) == 0
    assert "heal: going on from step 2" in capsys.readouterr().out
    found = [_params(folder) for folder in (finished, copy)]
    assert [leaf.tobytes() for leaf in found[0]] == [leaf.tobytes() for leaf in found[1]]


def _params(folder):
    """What healing left, as numbers."""
    made = build.experiment(command.load(flags())[0])
    params = train.load_params(folder / "heal" / "params", made.factored_shapes)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_without_an_average_the_result_is_another(finished, tmp_path):
    arguments = [*flags(stages="data,dense,eval", **{"train.ema": 0.0}), f"--workdir={tmp_path / 'run'}"]
    assert run.main(arguments) == 0
    losses = [
        [row["loss"] for row in rows(folder, "train") if row["phase"] == "dense"]
        for folder in (finished, tmp_path / "run")
    ]
    assert losses[0] == losses[1]
    values = [next(row["value"] for row in rows(folder, "eval")) for folder in (finished, tmp_path / "run")]
    assert values[0] != values[1]


def test_an_average_that_is_off_is_no_part_of_a_result():
    config = command.load(["--config=configs/gpt2_monarch.py:small"])[0]
    assert not [name for name in build.relevant(command.flatten(config)) if name.endswith(".ema")]
    config = command.load(["--config=configs/dit_xl_monarch.py:small"])[0]
    assert {"train.ema", "heal.ema"} < set(build.relevant(command.flatten(config)))


def test_all_stages_and_one_more():
    every = workdir.chosen("all")
    assert not {"sample", "roofline", "allocate"} & set(every)
    assert workdir.chosen("sample, all") == (*every[:6], "sample", *every[6:])
    assert every[5] == "eval"


def test_a_condition_is_one_token_of_the_model_s_own_layers(finished):
    timed = {row["layer"]: row["tokens"] for row in rows(finished, "bench")}
    assert timed == {"qkv": 4, "fc1": 4, "adaln": 1}


def _latents(root):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        np.save(root / name / "all.npy", random.normal(size=(20, 4, 8, 8)).astype(np.float32))
    return root


LATENTS = {
    "data.source": "latents",
    "data.scale": 0.5,
    "model.channels": 4,
    "model.out_channels": 8,
    "model.classes": 2,
    "stages": "data,dense,eval,sample",
}


def test_latents_stay_latents_without_an_autoencoder(tmp_path, capsys):
    given = flags("dit_xl_low_rank", **LATENTS, **{"data.path": _latents(tmp_path / "pets")})
    assert run.main([*given, f"--workdir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "32 + 8 latents of 2 classes" in out
    assert "no picture, sample.vae names no autoencoder" in out
    assert np.load(tmp_path / "run" / "sample" / "samples.npz")["dense"].shape == (4, 8, 8, 4)
    assert not (tmp_path / "run" / "sample" / "samples.png").exists()
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    drawing = [f"--workdir={tmp_path / 'run'}", "--config.stages=sample", f"--config.sample.vae={tmp_path / 'vae'}"]
    assert run.main([*given, *drawing]) == 0
    with Image.open(tmp_path / "run" / "sample" / "samples.png") as opened_sheet:
        sheet = np.asarray(opened_sheet)
    drawn = np.load(tmp_path / "run" / "sample" / "samples.npz")["dense"]
    with torch.no_grad():
        wanted = model.eval().decode(torch.from_numpy(drawn[:1]).movedim(-1, 1) / 0.5).sample[0].movedim(0, -1)
    # An image of 16 x 16 is drawn three times as large, at the first place.
    np.testing.assert_allclose(sheet[18 : 18 + 48 : 3, 34 : 34 + 48 : 3], pixels(wanted.numpy()), atol=1)
    (tmp_path / "vae" / "config.json").write_text("{")
    assert run.main([*given, *drawing, "--config.sample.seed=1"]) == 2
    assert "is no autoencoder that diffusers can load" in capsys.readouterr().err
    assert not (tmp_path / "run" / "sample" / "samples.png").exists()


@pytest.mark.parametrize("vae", ["{}/pets", "{}/absent", "./absent", "~/absent"])
def test_a_folder_without_an_autoencoder_is_refused_before_training(tmp_path, vae, capsys):
    path = _latents(tmp_path / "pets")
    given = flags(**LATENTS, **{"data.path": path, "sample.vae": vae.format(tmp_path)})
    assert run.main([*given, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "has no config.json: give the folder of an autoencoder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_little_memory_for_pictures_is_answered(finished, monkeypatch, capsys):
    def decode(images):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("blrlab.experiments.decoding.pixels", decode)
    given = flags(stages="sample", **{"sample.labels": 1, "sample.steps": 1})
    assert run.main([*given, f"--workdir={finished}"]) == 2
    assert "error: out of memory: lower the batch of" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("blrlab.experiments.decoding.pixels", lambda images: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.main([*given, f"--workdir={finished}"])


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "dit_original"])
def test_a_pretrained_dit_is_compressed_and_learns_from_its_blocks(tmp_path, name):
    shift = int(name != "dit_original")
    sizes = dit.Config(8, 4, 1, 2, 10, 1, 2, 24, 96, frequency_shift=shift)
    family = hf.FAMILIES[name]
    hf.save(tmp_path / "dit", family, sizes, family.init(sizes, jax.random.key(0)))
    stages = "data,dense,compress,heal" if shift else "data,dense"
    fields = {"init_from": tmp_path / "dit", "heal.distil": "outputs", "stages": stages, "compress.mode": "plain"}
    assert run.main([*flags(**fields), f"--workdir={tmp_path / 'run'}"]) == 0
    rows_of = records.read(tmp_path / "run" / "heal" / "records.jsonl") if shift else []
    assert all(row["distil_loss"] >= 0 and row["loss"] > 0 for row in rows_of)
    assert len(rows_of) == 2 * shift


def test_a_hugging_face_dataset_is_opened_again(tmp_path, monkeypatch):
    """What is mixed into the hash leaves the dataset's name where it is."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    pixels = [Image.fromarray(np.full((8, 8), 20 * index, np.uint8)) for index in range(10)]
    part = datasets.Dataset.from_dict({"image": pixels, "label": list(range(10))}, features=features)
    both = datasets.DatasetDict({"train": part, "validation": part})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: both)
    fields = {"data.source": "huggingface", "data.name": "some/pictures", "stages": "data,dense"}
    given = [*flags(**fields), f"--workdir={tmp_path / 'run'}"]
    assert run.main(given) == 0
    assert run.main(given) == 0  # from what is there
    found = json.loads((tmp_path / "run" / "data" / "data.json").read_text())
    assert (found["name"], found["train"], found["valid"]) == ("some/pictures", 10, 10)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model.out_channels": 1}, "model.out_channels is 1; it must be 2, twice model.channels"),
        ({"model.classes": 9}, "the data has 10 classes, the model 9"),
        ({"model.channels": 2, "model.out_channels": 4}, "model.channels is 2; pictures have 1 or 3"),
        ({"data.source": "latent"}, 'Did you mean "latents"'),
        ({"data.source": "latents"}, 'no folder of latents at ""'),
        ({"data.source": "folder"}, 'no folder of images at ""'),
        ({"data.scale": 0}, "config.data.scale is 0"),
        ({"noise.steps": 0}, "the noise has 0 steps"),
        ({"noise.last": 1.0}, "a beta of the noise is 1.0"),
        ({"noise.dropped": 1.5}, "config.noise.dropped is 1.5"),
        ({"train.ema": 1.0}, "config.train.ema is 1.0"),
        ({"heal.ema": -0.5}, "config.heal.ema is -0.5"),
        ({"heal.distil": "logits"}, "which a denoiser has not: take outputs"),
        ({"sample.sampler": "dpm"}, 'unknown sample.sampler "dpm"'),
        ({"sample.steps": 1001}, "1001 steps cannot be taken from a noise of 1000"),
        ({"sample.labels": "1,10"}, 'sample.labels is numbers of classes, 0 to 9, commas between; not "1,10"'),
        ({"sample.each": 0}, "config.sample.each is 0"),
        ({"sample.guidance": -1}, "config.sample.guidance is -1"),
        ({"sample.fid_guidance": -1}, "config.sample.fid_guidance is -1"),
        ({"sample.fid": 1}, "config.sample.fid is 1; a distance needs at least 2 images"),
        ({"model.size": 7}, "patch of 4 does not divide its size of 7"),
        ({"model.family": "dti"}, 'Did you mean "dit"'),
        ({"train.batch": 5000}, "training images, less than one batch of 5000"),
    ],
    ids=str,
)
def test_what_a_dit_cannot_have(tmp_path, fields, said, capsys):
    given = flags(**{"stages": "data,dense,compress,sample", **fields})
    assert run.main([*given, f"--workdir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_latents_of_another_size_are_refused(tmp_path, capsys):
    given = flags(**LATENTS, **{"data.path": _latents(tmp_path / "pets"), "model.size": 16})
    assert run.main([*given, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "the latents are 4 x 8 x 8, but the model sees 4 x 16 x 16" in capsys.readouterr().err


def test_other_models_draw_nothing(tmp_path, capsys):
    assert run.main(["--config=configs/gpt2_monarch.py:small", "--config.stages=all,sample"]) == 2
    assert "draws images, which a gpt2 does not" in capsys.readouterr().err


class Distance:
    """What torchmetrics' distance is asked to do, with means of pixels in the place of features."""

    device = "cpu"

    def __init__(self, reset_real_features):
        assert not reset_real_features
        self.seen = {True: [], False: []}

    def to(self, device):
        return self

    def reset(self):
        self.seen[False] = []

    def update(self, pictures, real):
        assert str(pictures.dtype) == "torch.uint8"
        assert pictures.shape[1:] == (3, 8, 8)
        self.seen[real].append(pictures.double().mean(dim=(1, 2, 3)))

    def compute(self):
        import torch

        real, drawn = (torch.cat(self.seen[side]) for side in (True, False))
        assert (len(real), len(drawn)) == (70, 70)
        return real.mean()


def _metric(monkeypatch, made):
    for name in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(FrechetInceptionDistance=made))


def test_the_distance_is_recorded_with_how_images_were_drawn(finished, monkeypatch):
    decoded, guidances, sampled = [], [], sample_stage.sampling.sample

    def counted(images):
        decoded.append(len(images))
        return pixels(images)

    def watched(*arguments, guidance, **options):
        guidances.append(guidance)
        return sampled(*arguments, guidance=guidance, **options)

    _metric(monkeypatch, Distance)
    monkeypatch.setattr("blrlab.experiments.decoding.pixels", counted)
    monkeypatch.setattr(sample_stage.sampling, "sample", watched)
    given = flags(stages="sample", **{"sample.fid": 70, "sample.sampler": "ddim", "sample.labels": "1"})
    assert run.main([*given, f"--workdir={finished}"]) == 0
    found = rows(finished / "sample", "eval")
    stages = ["dense", "dense_continued", "compressed", "healed"]
    assert [(row["stage"], row["metric"], row["examples"]) for row in found] == [(name, "fid", 70) for name in stages]
    assert {row["unit"] for row in found} == {"to 70 images, ddim 3, guidance 1"}
    # The picture is guided, what is measured is not; what is held out is decoded once, each model's in batches.
    assert guidances == [2.0] * 4 + [1.0] * 5 * 4
    assert decoded == [64, 6, *[16, 16, 16, 16, 6] * 4, 2, 2, 2, 2]
    held = images.held_out(images.load(finished / "data").valid, 8, 1, 70)["image"]
    assert [row["value"] for row in found] == pytest.approx([pixels(held).mean()] * 4)


def test_a_distance_that_cannot_be_is_skipped_with_its_reason(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    given = [*flags(stages="sample", **{"sample.fid": 12, "sample.labels": "2"}), f"--workdir={finished}"]
    assert run.main(given) == 0
    assert "FID skipped: torchmetrics" in capsys.readouterr().out
    assert rows(finished / "sample", "eval") == []

    def absent(reset_real_features):
        raise ModuleNotFoundError("FrechetInceptionDistance requires that Torch-fidelity is installed")

    _metric(monkeypatch, absent)
    assert fid.metric_or_reason() == (None, "FrechetInceptionDistance requires that Torch-fidelity is installed")


def test_one_image_held_out_has_no_distance(finished, monkeypatch, capsys):
    _metric(monkeypatch, Distance)
    held = images.Images.__init__

    def one(self, train, valid, summary):
        held(self, train, valid.at([0]), summary)

    monkeypatch.setattr(images.Images, "__init__", one)
    given = flags(stages="sample", **{"sample.fid": 70, "sample.labels": "4"})
    assert run.main([*given, f"--workdir={finished}"]) == 0
    assert "FID skipped: 1 image is held out, and a distance needs at least 2" in capsys.readouterr().out
