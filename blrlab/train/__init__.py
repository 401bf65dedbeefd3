"""Small functional loops: (state, batch) -> (state, metrics), resumable to the bit."""

from blrlab.train.checkpoint import Checkpoints, load_params, save_params
from blrlab.train.diffusion import denoising
from blrlab.train.distil import distil_loss
from blrlab.train.evaluate import evaluate
from blrlab.train.loop import Plan, fit
from blrlab.train.objective import NEXT_TOKEN, Objective, classes, next_token_loss
from blrlab.train.optimizer import averaged, make_optimizer, make_schedule
from blrlab.train.sharding import data_parallel
from blrlab.train.step import State, data_loss, init_state, make_step

__all__ = [
    "NEXT_TOKEN", "Checkpoints", "Objective", "Plan", "State", "averaged", "classes", "data_loss", "data_parallel",
    "denoising", "distil_loss", "evaluate", "fit", "init_state", "load_params", "make_optimizer", "make_schedule",
    "make_step", "next_token_loss", "save_params",
]  # fmt: skip
