"""Build both wheels, install them elsewhere, and use them from another directory.

Run as a program: it needs the tools of the dev extra. What it guards against: files missing from a wheel, tests or
`ops` leaking into one, and imports that only work inside the checkout.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import sys, pathlib, blrlab, blrlab_ops
site = pathlib.Path(sys.argv[1])
for module in (blrlab, blrlab_ops):
    assert site in pathlib.Path(module.__file__).parents, module.__file__
assert "jax" not in sys.modules and "torch" not in sys.modules, "importing the packages must load neither"
import torch
from blrlab_ops import monarch
V, U = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 5, 6)
assert monarch.linear(torch.randn(7, 8), V, U).shape == (7, 18)
assert "jax" not in sys.modules, "blrlab_ops must not load JAX"
import jax
from blrlab import factors
spec = factors.Spec("blast", 8, 12, (2, 2), 3)
assert factors.apply(factors.init(jax.random.key(0), spec), jax.numpy.ones((5, 8))).shape == (5, 12)
"""


def main() -> None:
    """Build, look inside, install, use."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for project in (ROOT, ROOT / "ops"):
            build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
            _run([sys.executable, *build, str(project)], ROOT)
        wheels = sorted((folder / "dist").glob("*.whl"))
        assert len(wheels) == 2, wheels
        for wheel, package in zip(wheels, ("blrlab", "blrlab_ops"), strict=True):
            _look(wheel, package)
        site = folder / "site"
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
        _run([sys.executable, *install, *map(str, wheels)], folder)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        _run([sys.executable, "-c", CHECK, str(site)], folder, environment)
        _run([sys.executable, "-m", "blrlab.experiments.run", "--help"], folder, environment)
        _run([sys.executable, "-m", "blrlab.report", "--help"], folder, environment)
    print("wheels: 2 built, installed and used from another directory")


def _look(wheel: Path, package: str) -> None:
    """Check that a wheel holds the sources and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {package, next(top for top in tops if top.endswith(".dist-info"))}, tops
    home = ROOT / package if package == "blrlab" else ROOT / "ops" / package
    missing = {str(path.relative_to(home.parent)) for path in home.rglob("*.py")} - set(names)
    assert not missing, missing
    assert f"{package}/py.typed" in names


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
