"""Which machine, versions and commit a number comes from. Imports neither JAX nor PyTorch."""

import datetime
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import blrlab


def describe(device: str, backend: str, devices: int = 1) -> dict[str, Any]:
    """Return time, commit, device, backend and versions; null for what is not there.

    Args:
      device: the name of the device at work; empty for this machine's processor.
      backend: cpu, gpu or another kind.
      devices: how many of them.
    """
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": device or cpu(),
        "backend": backend,
        "devices": devices,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "torch", "triton")},
        "driver": _driver(),
    }


@functools.cache
def _driver() -> str | None:
    return run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


@functools.cache
def _commit() -> str | None:
    """Return the commit of the checkout blrlab runs from, marked `-dirty` if changed; None for an installed one."""
    root = Path(blrlab.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    return run("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def cpu() -> str:
    """Return the processor's name and how many cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {_cores()} cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version(package: str) -> str | None:
    """Return a package's installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(*command: str) -> str | None:
    """Return a command's output, or None where it fails or is not there."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
