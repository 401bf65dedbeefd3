"""Budgets and extrapolated times in the report: every figure from the records, nothing said of what they lack."""

import io

from rich.console import Console

from blrlab.report import markdown, print_report
from blrlab.report.page import page

LAYER = {"kind": "allocate", "in_features": 192, "out_features": 576}
BUDGET = [
    {"kind": "env", "config": "gpt2_blast", "device": "a CPU"},
    {**LAYER, "path": "h_0/attn/c_attn", "format": "dense", "blocks": [1, 1], "rank": 0, "block_rank": None}
    | {"lost": 0.0, "weight": 0.5, "params_before": 110592, "params_after": 110592},
    {**LAYER, "path": "h_0/mlp/c_fc", "format": "monarch", "blocks": [4, 8], "rank": None, "block_rank": 6}
    | {"lost": 0.25, "weight": 0.01, "params_before": 110592, "params_after": 27648},
    {"kind": "allocate", "path": "*", "target": "layer_factor", "value": 1.6, "plan": "budget", "total": 0.0025},
    {"kind": "allocate", "path": "*", "target": "layer_factor", "value": 1.6, "plan": "low_rank", "total": 0.0125},
    {"kind": "allocate", "path": "*", "target": "layer_factor", "value": 1.6, "plan": "blast 4", "total": 0.0075},
]
TIMES = [
    {"kind": "env", "device": "a GPU"},
    {"kind": "extrapolation", "net": "llama7b", "format": "blast", "algorithm": "alternating", "weights": "random"}
    | {"layers": {"qkvo": {"matrices": 128, "measured": 2, "seconds_each": 2.5}, "down": {"matrices": 32}}}
    | {"seconds": 1234.5, "compile_seconds": 34.0, "host_peak_bytes": 1.5e9, "device_peak_bytes": None},
]


def _printed(records) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_report(records, console)
    return console.file.getvalue()


def test_a_budget_says_who_gets_what_and_what_equal_shares_lose():
    told = markdown(BUDGET, "budget")
    assert "**Budget: layers 1.60x smaller, gpt2_blast**" in told
    assert "| h_0/attn/c_attn | dense | 192 x 576 | - | - | 100 % | 0.0000 | 0.0000 |" in told
    assert "| h_0/mlp/c_fc | Monarch | 192 x 576 | 4 x 8 | - (6 a block) | 25 % | 0.2500 | 0.0025 |" in told
    assert "Expected to lose 0.0025 in all; in equal shares: blast 4 0.0075, low rank 0.0125." in told
    for shown in (_printed(BUDGET), page(BUDGET)):
        assert "Budget: layers 1.60x smaller" in shown
        assert "equal shares: blast 4 0.0075" in shown
    assert "Nothing was trained" not in _printed(BUDGET)
    assert "These records hold no" not in page(BUDGET)


def test_a_budget_without_weights_does_not_speak_of_the_models_loss():
    alike = [{**row, "weight": 1.0} if "weight" in row else row for row in BUDGET]
    assert "loss of the model" not in markdown(alike, "budget")


def test_what_a_budgets_records_lack_is_left_out():
    rows = [BUDGET[0], {"kind": "allocate", "path": "a", "format": "blast"}, {"kind": "allocate", "path": "*"}]
    told = markdown(rows, "budget")
    assert "**Budget: target unknown, gpt2_blast**" in told
    assert "| a | BLAST | - |" in told
    assert "Expected" not in told
    nothing_else = {"kind": "allocate", "path": "*", "plan": "budget", "total": 1.0, "target": "bytes", "value": 2e9}
    told = markdown([BUDGET[0], nothing_else], "budget")
    assert "**Budget: 2 GB, gpt2_blast**" in told
    assert "in equal shares: none fits." in told
    assert "Budget: 2 acres" in markdown([BUDGET[0], nothing_else | {"target": "acres", "value": 2}], "budget")


def test_extrapolated_times_say_what_they_are():
    told = markdown(TIMES, "extrapolation")
    assert "**Extrapolated, not measured: compressing all matrices of a net on a GPU**" in told
    assert "| llama7b | BLAST | alternating | qkvo | 128 | 2 | 2.50 | 320 |" in told
    assert "|  |  |  | down | 32 | - | - | - |" in told
    assert "llama7b as BLAST (alternating): 1,234 s, 34 s of them for compilation, 1.5 GB on the host at most" in told
    assert told.endswith(", random weights.")
    for shown in (_printed(TIMES), page(TIMES)):
        assert "Extrapolated, not measured" in shown
    assert "These records hold no" not in page(TIMES)
    bare = markdown([TIMES[0], {"kind": "extrapolation", "net": "gpt2s"}], "extrapolation")
    assert "| gpt2s | - | unknown | - | - | - | - | - |" in bare
