"""Child processes for the tests of blrlab_ops: Triton's interpreter is chosen once for each process."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
try:
    import blrlab_ops
except ModuleNotFoundError:  # a bare clone on a GPU machine has nothing to install for these tests
    sys.path.insert(0, str(HERE.parents[1] / "ops"))
    import blrlab_ops


@pytest.fixture(scope="session")
def run_child():
    """Run `python *arguments` in this folder, interpreted or not; return its standard output.

    Fails with all of the child's output unless it exits with `status`.
    """

    def run(*arguments: str, interpret: bool = False, status: int = 0) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        package = str(pathlib.Path(blrlab_ops.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")]).strip(os.pathsep)
        environment["OMP_NUM_THREADS"] = "1"  # interpreted tiles are small, and idle threads spin
        if interpret:
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, f"{command} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def needs_triton():
    pytest.importorskip("triton", reason="Triton is not installed")
