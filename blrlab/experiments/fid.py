"""The Frechet inception distance of drawn images to held-out ones (Heusel et al., arXiv 1706.08500), by torchmetrics.

The published network and its weights are torchmetrics' affair: where they are not at hand, there is no number. Pixels
are made a batch at a time and forgotten; of what is held out the features' sums are kept for all models.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from blrlab import records
from blrlab.experiments import model_stages
from blrlab.experiments.decoding import Decode
from blrlab.experiments.model_stages import EVALUATED, Run
from blrlab.experiments.tasks import diffusion

Draw = Callable[[str, np.ndarray, int, float], Iterator[np.ndarray]]
BATCH = 64
APART = 1  # added to sample.seed, so that the picture's images are not drawn again


def rows(run: Run, names: Sequence[str], draw: Draw, decode: Decode | None, reason: str) -> list[records.Record]:
    """Return a record for every model, or none and say why.

    Labels are spread evenly over the classes; the other side is as many of what is held out, decoded as well.

    Args:
      run: of the experiment.
      names: of the models, as records have them.
      draw: (stage, labels [n], seed, guidance) -> batches of images [b, h, h, C].
      decode: images -> pixels, or None.
      reason: why not.
    """
    made, config, held = run.made, run.made.config.sample, len(run.dataset.valid)
    if held < 2:
        decode, reason = None, f"{held} image is held out, and a distance needs at least 2"
    metric, reason = (None, reason) if decode is None else metric_or_reason()
    if decode is None or metric is None:
        run.say(f"sample: FID skipped: {reason}")
        return []
    real = _update(metric, map(decode, diffusion.held_out_images(made, run.dataset, config.fid, BATCH)), real=True)
    how = f"{config.sampler} {config.steps}, guidance {config.fid_guidance:g}"
    wanted = np.arange(config.fid) % made.model.classes
    found: list[records.Record] = []
    for stage in (stage for stage, name in EVALUATED.items() if name in names):
        metric.reset()
        drawn = draw(stage, wanted, config.seed + APART, config.fid_guidance)
        _update(metric, map(decode, drawn), real=False)
        value = float(metric.compute())
        dense = stage in ("dense", "continue")
        measured = [("fid", value, f"to {real} images, {how}")]
        found += model_stages.eval_records(run, EVALUATED[stage], measured, config.fid, factored=not dense)
        run.say(f"sample: {EVALUATED[stage]:<16} FID {value:.2f}, {config.fid} images to {real}, {how}")
    return found


def metric_or_reason() -> tuple[Any, str]:
    """Return torchmetrics' distance, on the GPU where PyTorch has one, or None and the reason."""
    try:
        import torch

        library: Any = importlib.import_module("torchmetrics.image.fid")  # which few have
    except ImportError as error:
        return None, f"{error.name} is not installed"
    try:
        metric = library.FrechetInceptionDistance(reset_real_features=False)
    except Exception as error:  # torch-fidelity is missing, or its weights cannot be had
        return None, " ".join(str(error).split())[:200] or type(error).__name__
    return metric.to("cuda" if torch.cuda.is_available() else "cpu"), ""


def _update(metric: Any, batches: Iterable[np.ndarray], real: bool) -> int:
    """Show the metric batches of pixels, uint8 [b, h, w, 3]; return how many images they were."""
    import torch

    count = 0
    for pixels in batches:
        count += len(pixels)
        for start in range(0, len(pixels), BATCH):
            part = np.ascontiguousarray(np.moveaxis(pixels[start : start + BATCH], -1, 1))
            metric.update(torch.from_numpy(part).to(metric.device), real=real)
    return count
