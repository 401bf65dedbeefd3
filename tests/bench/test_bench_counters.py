"""The profiler's counters: its CSV is read, summed by range, and set beside what the cost model says."""

import json
import subprocess
from pathlib import Path

import pytest

from blrlab import records
from blrlab.bench import counters
from blrlab.bench.counters import KERNEL_COUNTERS, RANGE_COUNTERS
from blrlab.errors import InputError

METRICS = [metric for parts in RANGE_COUNTERS.values() for metric in parts]
UNITS = {"sm__ops_path_tensor_src_bf16_dst_fp32.sum": "", "lts__t_sectors_srcunit_tex.sum": "sector"}


def quoted(*cells: object) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


def table(*rows: dict[str, str], metrics: list[str] = METRICS) -> list[str]:
    """Write what `ncu --csv --page raw` prints: names, units under an empty ID, and a line a range."""
    lines = [
        quoted("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", *metrics),
        quoted("", "", "", "", "", *(UNITS.get(metric, "byte") for metric in metrics)),
    ]
    for number, row in enumerate(rows):
        lines.append(quoted(number, "4711", "python3", "127.0.0.1", "range", *(row[metric] for metric in metrics)))
    return lines


FIRST = dict(zip(METRICS, ["34,359,738,368", "213,394,432", "1,048,576", "9,000,000"], strict=True))
SECOND = dict(zip(METRICS, ["0", "100", "23", "2"], strict=True))


def described(impl: str, **fields: object) -> dict:
    """Make a row as the child prints it."""
    row = {
        "kind": "counters",
        "device": "a card",
        "impl": impl,
        "op": "dense",
        "net": "llama7b",
        "layer": "qkvo",
        "tokens": 1024,
        "calls": 2,
    }
    predicted = {"tensor_flops": 17179869184, "cuda_flops": 0, "dram_bytes": 107221504, "l2_bytes": 144000000}
    return row | predicted | fields


def test_counters_are_summed_by_range_each_worth_its_part() -> None:
    found = counters.parse("\n".join(table(FIRST, SECOND)), RANGE_COUNTERS)
    assert found == [
        {"tensor_flops": 34_359_738_368, "dram_bytes": 213_394_432 + 1_048_576, "l2_bytes": 32 * 9_000_000},
        {"tensor_flops": 0, "dram_bytes": 123, "l2_bytes": 64},
    ]


def test_fused_multiply_adds_are_two_operations() -> None:
    metrics = list(KERNEL_COUNTERS["cuda_flops"])
    assert [metric.split("_op_")[1][:4] for metric in metrics] == ["ffma", "fadd", "fmul"]
    row = dict(zip(metrics, ["1,000", "20", "3"], strict=True))
    assert counters.parse("\n".join(table(row, metrics=metrics)), KERNEL_COUNTERS) == [{"cuda_flops": 2023.0}]


def test_what_others_print_between_is_left_out() -> None:
    lines = table(FIRST)
    text = "\n".join(
        [
            "==PROF== Connected to process 4711",
            json.dumps(described("torch_eager")),
            *lines[:2],
            "==WARNING== a note",
            lines[2],
            "==PROF== Disconnected",
        ]
    )
    assert len(counters.parse(text, RANGE_COUNTERS)) == 1
    assert counters._described(text) == [described("torch_eager")]


@pytest.mark.parametrize("text", ["", "==ERROR== nothing was profiled", "\n".join(table())])
def test_no_table_is_no_range(text: str) -> None:
    assert counters.parse(text, RANGE_COUNTERS) == []


def test_a_child_that_runs_once_a_pass_is_described_once_and_in_order() -> None:
    rows = [described("torch_eager"), described("torch_bmm", op="monarch"), described("torch_bmm", op="blast")]
    one_pass = "\n".join(json.dumps(row) for row in rows)
    assert counters._described(f"{one_pass}\na line\n{one_pass}\n{one_pass}") == rows


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch):
    """Let ncu print this, for all backends and for the mixing kernels; return the commands."""
    commands: list[list[str]] = []
    said = {"all": "", "mixing": "", "stderr": "", "code": 0}

    def run(command, **options):
        commands.append(command)
        child = next(flag for flag in command if flag.startswith("--child=")).removeprefix("--child=")
        return subprocess.CompletedProcess(command, said["code"], said[child], said["stderr"])

    monkeypatch.setattr(counters.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    machine = dict.fromkeys(("torch", "triton", "driver", "commit", "time"), "known")
    monkeypatch.setattr(counters.environment, "describe", lambda device, backend: machine | {"device": device})
    return said, commands


def printed(rows: list[dict], ranges: list[dict[str, str]], metrics: list[str] = METRICS) -> str:
    return "\n".join([*map(json.dumps, rows), *table(*ranges, metrics=metrics)])


MIXING = list(KERNEL_COUNTERS["cuda_flops"])


def test_counted_is_of_one_call_and_beside_predicted(profiler, capsys, tmp_path: Path) -> None:
    said, commands = profiler
    blast = described("triton_two_stage", op="blast", cuda_flops=2000, calls=4)
    said["all"] = printed([described("torch_eager"), blast], [FIRST, SECOND])
    mixing = dict(zip(MIXING, ["1,000", "20", "3"], strict=True))
    said["mixing"] = printed([blast | {"calls": 1}], [mixing], MIXING)
    out = tmp_path / "new" / "counters.jsonl"
    assert counters.main(["--layer=qkvo", "--tokens=1024", f"--out={out}"]) == 0
    first, second = records.read(out)
    assert first["counted_tensor_flops"] == 34_359_738_368 / 2
    assert first["counted_dram_bytes"] == (213_394_432 + 1_048_576) / 2
    assert (first["counted_cuda_flops"], second["counted_cuda_flops"]) == (None, 2023.0)
    assert second["counted_l2_bytes"] == 64 / 4
    assert (first["device"], first["commit"], first["torch"]) == ("a card", "known", "known")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "tensor_flops 1.718e+10 / 1.718e+10 = 1.000; dram_bytes 1.072e+08 / 1.072e+08 = 1.000" in lines[0]
    assert "cuda_flops 2.023e+03 / 2.000e+03 = 1.012" in lines[1]
    whole, mixed = commands
    assert whole[:3] == ["/opt/ncu", "--replay-mode", "app-range"]
    assert ",".join(METRICS) in whole
    assert ",".join(MIXING) in mixed
    for command in commands:
        assert {"--net=llama7b", "--layer=qkvo", "--tokens=1024"} <= set(command)


def test_without_ncu_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    assert counters.main(["--layer=qkvo"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == ("blrlab.bench.counters: no ncu on the path: it comes with the CUDA toolkit (Nsight Compute).\n")


def test_a_profiler_that_fails_is_quoted(profiler) -> None:
    said, _ = profiler
    said |= {"stderr": "a note\n==ERROR== ERR_NVGPUCTRPERM: no permission to read counters\n", "code": 1}
    with pytest.raises(InputError, match="ncu counted 0 of 0: ==ERROR== ERR_NVGPUCTRPERM: no permission"):
        list(counters.count("llama7b", "", "0"))


def test_ranges_that_are_not_the_ones_described_are_an_error(profiler) -> None:
    profiler[0]["all"] = printed([described("torch_eager"), described("torch_bmm")], [FIRST])
    with pytest.raises(InputError, match="ncu counted 1 of 2: no error was printed"):
        list(counters.count("llama7b", "", "0"))


def test_a_profiler_that_takes_too_long_is_one_sentence(profiler, monkeypatch, capsys) -> None:
    def run(command, *, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert counters.main([]) == 2
    assert (
        capsys.readouterr().err == "blrlab.bench.counters: ncu took longer than 480 s: name fewer layers or tokens.\n"
    )
