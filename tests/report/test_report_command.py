"""`python -m blrlab.report` on folders, files and damaged ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from blrlab.report.__main__ import main


@pytest.fixture
def folder(tmp_path, build):
    run = tmp_path / "run"
    run.mkdir()
    rows = [build.env(), *build.evaluation("dense", 1.52), *build.bench()]
    (run / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


def test_a_folder_a_file_and_a_page(folder, tmp_path, capsys):
    page = tmp_path / "report.html"
    assert main([str(folder), f"--out={page}"]) == 0
    said = capsys.readouterr().out
    assert "1.520" in said
    assert str(page) in said.replace("\n", "")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main([str(folder / "records.jsonl")]) == 0
    assert "1.520" in capsys.readouterr().out


def test_several_runs_are_told_apart(folder, tmp_path, capsys):
    second = tmp_path / "second.jsonl"
    second.write_text((folder / "records.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    assert main([str(folder), str(second)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^run +dense ", said, re.MULTILINE)
    assert re.search(r"^second.jsonl +dense ", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"kind": "env", "ti', "records.jsonl, line 2 is damaged"),
        (b"[1, 2]", "records.jsonl, line 2 is damaged"),
        (b"\xff", "records.jsonl, line 2 is damaged"),
    ],
)
def test_a_damaged_line_is_one_sentence(tmp_path, capsys, line, problem):
    (tmp_path / "records.jsonl").write_bytes(b'{"kind": "env"}\n' + line + b"\n")
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert problem in said.err
    assert said.err.count("\n") == 1


def test_the_line_that_a_kill_tore_is_left_out(folder, capsys):
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "eval", "sta')
    assert main([str(folder)]) == 0
    assert "1.520" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["absent", "absent.jsonl", "."])
def test_a_bad_path_is_one_sentence(tmp_path, capsys, name):
    assert main([str(tmp_path / name)]) == 2
    assert "no records at" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_an_error(folder, tmp_path, capsys):
    assert main([str(folder), f"--out={tmp_path / 'absent' / 'report.html'}"]) == 2
    assert "absent" in capsys.readouterr().err


def test_the_report_loads_no_jax_and_no_torch(folder):
    check = (
        "import sys, runpy\n"
        f"sys.argv = ['report', {str(folder)!r}]\n"
        "try:\n    runpy.run_module('blrlab.report', run_name='__main__')\n"
        "except SystemExit as done:\n    assert done.code == 0, done.code\n"
        "found = {'jax', 'torch', 'flax', 'matplotlib'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_figures_are_complete_svg_files(folder, tmp_path, capsys):
    drawn = tmp_path / "new" / "figures"
    assert main([str(folder), f"--figures={drawn}"]) == 0
    names = sorted(file.name for file in drawn.iterdir())
    assert f"wrote {len(names)} figures" in capsys.readouterr().out.replace("\n", " ")
    assert "roofline_of_amd_epyc_7b13_2_cores.svg" in names
    for file in drawn.iterdir():
        root = ElementTree.parse(file).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert "--ink: #1b2430" in root.find("{http://www.w3.org/2000/svg}style").text
