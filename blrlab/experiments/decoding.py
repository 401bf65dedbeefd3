"""From what a model of images works on to pixels: as they are, or through an autoencoder of diffusers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from blrlab.data import latents
from blrlab.errors import InputError, home_expanded
from blrlab.experiments.build import Experiment

BATCH = 8  # latents that are decoded at once, where sample.batch is not smaller
Decode = Callable[[np.ndarray], np.ndarray]


def check(made: Experiment) -> None:
    """Check `config.sample.vae`, before there is anything to decode.

    Raises:
      InputError: it is a folder here without an autoencoder.
    """
    given = made.config.sample.vae
    if not given or made.config.data.source != latents.SOURCE:
        return
    folder = home_expanded(given)
    if (folder.is_dir() or given.startswith(("/", ".", "~"))) and not (folder / "config.json").is_file():
        raise InputError(
            f'sample.vae="{given}" has no config.json: give the folder of an autoencoder that diffusers can load (of a '
            "pipeline's, its folder vae), or a name on the Hugging Face hub."
        )


def decoder(made: Experiment) -> tuple[Decode | None, str]:
    """Return what makes pixels, uint8 [n, h, w, 3], of a model's images [n, h, h, C], or None and the reason.

    Raises:
      InputError: `config.sample.vae` is no autoencoder, or not one of these latents.
    """
    config = made.config
    if config.data.source != latents.SOURCE:
        return pixels, ""
    if not config.sample.vae:
        return None, "sample.vae names no autoencoder for the latents"
    batch = min(BATCH, config.sample.batch)
    return _through(config.sample.vae, config.data.scale, made.model.channels, batch), ""


def pixels(images: np.ndarray) -> np.ndarray:
    """Return images [n, h, w, 1 or 3] between -1 and 1 as bytes with three channels."""
    found = np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)
    return np.repeat(found, 3, axis=-1) if found.shape[-1] == 1 else found


def _through(name: str, scale: float, channels: int, batch: int) -> Decode:
    """Return what divides latents by their scale and decodes them on the CPU or, where PyTorch has one, the GPU."""
    model: Any = _loaded(name)
    if model.config.latent_channels != channels:
        raise InputError(f"{name} decodes {model.config.latent_channels} channels, and the latents have {channels}.")
    import torch

    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def decode(images: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(images), batch):
            part = torch.from_numpy(np.moveaxis(images[start : start + batch], -1, 1) / scale).float()
            with torch.no_grad():
                made = model.decode(part.to(model.device)).sample
            found.append(pixels(np.moveaxis(made.float().cpu().numpy(), 1, -1)))
        return np.concatenate(found)

    return decode


def _loaded(name: str) -> Any:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise InputError("sample.vae needs PyTorch and diffusers: pip install torch diffusers.") from None
    try:
        return AutoencoderKL.from_pretrained(str(home_expanded(name)))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f'sample.vae="{name}" is no autoencoder that diffusers can load: {reason}') from None
