"""The Frechet inception distance of drawn images to held-out ones (Heusel et al., arXiv 1706.08500), by torchmetrics.

The published network and its weights are torchmetrics' affair: where they are not at hand, there is no number.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blrlab import records
from blrlab.experiments import model_stages
from blrlab.experiments.decoding import Decode
from blrlab.experiments.model_stages import EVALUATED, Run

Draw = Callable[[str, np.ndarray, int], np.ndarray]
BATCH = 64
APART = 1  # added to sample.seed, so that the picture's images are not drawn again


def rows(run: Run, names: Sequence[str], draw: Draw, decode: Decode | None, reason: str) -> list[records.Record]:
    """Return a record for every model, or none and say why.

    Labels are spread evenly over the classes; the other side is as many of what is held out, decoded as well.

    Args:
      run: of the experiment.
      names: of the models, as records have them.
      draw: (stage, labels [n], seed) -> images [n, h, h, C].
      decode: images -> pixels, or None.
      reason: why not.
    """
    measure, reason = (None, reason) if decode is None else measure_or_reason()
    if decode is None or measure is None:
        run.say(f"sample: FID skipped: {reason}")
        return []
    made, config = run.made, run.made.config.sample
    real = decode(made.task.held_out(made, run.dataset, config.fid)["image"])
    wanted = np.arange(config.fid) % made.model.classes
    found: list[records.Record] = []
    for stage in (stage for stage, name in EVALUATED.items() if name in names):
        value = measure(real, decode(draw(stage, wanted, config.seed + APART)))
        metric = [("fid", value, f"to {len(real)} images")]
        dense = stage in ("dense", "continue")
        found += model_stages.eval_records(run, EVALUATED[stage], metric, config.fid, factored=not dense)
        run.say(f"sample: {EVALUATED[stage]:<16} FID {value:.2f}, {config.fid} images to {len(real)}")
    return found


def measure_or_reason() -> tuple[Callable[[np.ndarray, np.ndarray], float] | None, str]:
    """Return (real, drawn) uint8 [n, h, w, 3] -> distance, or None and the reason."""
    try:
        import torch

        library: Any = importlib.import_module("torchmetrics.image.fid")  # which few have
    except ImportError as error:
        return None, f"{error.name} is not installed"
    try:
        metric = library.FrechetInceptionDistance()
    except Exception as error:  # torch-fidelity is missing, or its weights cannot be had
        return None, " ".join(str(error).split())[:200] or type(error).__name__

    def measure(real: np.ndarray, drawn: np.ndarray) -> float:
        metric.reset()
        for images, is_real in ((real, True), (drawn, False)):
            for start in range(0, len(images), BATCH):
                part = np.ascontiguousarray(np.moveaxis(images[start : start + BATCH], -1, 1))
                metric.update(torch.from_numpy(part), real=is_real)
        return float(metric.compute())

    return measure, ""
