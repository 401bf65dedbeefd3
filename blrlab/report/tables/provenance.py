"""Where the numbers come from: machine, versions, commit and data of every run."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, Run, finite, labels, mapping, text
from blrlab.report.tables.table import Column, Table

SOFTWARE = ("python", "jax", "torch", "triton", "driver")


def provenance_table(runs: list[Run]) -> Table | None:
    """Return a row per fact with a column per run, or None where no run recorded its environment."""
    known = [(label, run) for label, run in zip(labels(runs), runs, strict=True) if run.env]
    if not known:
        return None
    facts = [_facts(run) for _, run in known]
    rows = [(name, *(fact[name] for fact in facts)) for name in facts[0]]
    rows = [row for row in rows if set(row[1:]) != {words.MISSING}]
    columns = (Column("", 0, False), *(Column(label, 0, False) for label, _ in known))
    return Table("Machine, software and data", columns, tuple(rows))


def _facts(run: Run) -> dict[str, str]:
    env = run.env
    data, peaks = mapping(env.get("data")), mapping(env.get("peaks"))
    return {
        "time": text(env.get("time"), words.MISSING),
        # Stages of one run may have been run at different commits, and then all of them count.
        "commit": _joined(*dict.fromkeys(text(r.get("commit"), "") for r in run.of("env"))),
        "config": " ".join(part for part in (text(env.get("config"), ""), text(env.get("scale"), "")) if part),
        "device": _device(env),
        "software": ", ".join(f"{key} {text(env.get(key), 'absent')}" for key in SOFTWARE),
        "peaks": _peaks(peaks),
        "parameters": f"{parameters:,.0f}" if (parameters := finite(env.get("parameters"))) else words.MISSING,
        "data": _source(data),
        "data hash": text(data.get("hash"), words.MISSING),
        "data size": _sizes(data),
        "tokenizer": _tokenizer(data),
        "unigram entropy": f"{entropy:.3f} nats/byte"
        if (entropy := finite(data.get("unigram_entropy")))
        else words.MISSING,
    }


def peaks_in_words(peaks: Record) -> str:
    """Write a machine's peak rates, or an empty text where either is missing."""
    flops, bandwidth = finite(peaks.get("flops_per_s")), finite(peaks.get("bytes_per_s"))
    if not flops or not bandwidth:
        return ""
    rates = f"{words.rate(flops, 'FLOP/s')} {text(peaks.get('dtype'), '')}".rstrip()
    return f"{rates}, {words.rate(bandwidth, 'B/s')}"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part) or words.MISSING


def _device(env: Record) -> str:
    backend, devices = text(env.get("backend"), ""), finite(env.get("devices"))
    return _joined(
        text(env.get("device")),
        backend,
        f"{devices:.0f} {'device' if devices == 1 else 'devices'}" if devices else "",
    )


def _peaks(peaks: Record) -> str:
    return _joined(text(peaks.get("name"), ""), peaks_in_words(peaks), text(peaks.get("source"), ""))


def _tokenizer(data: Record) -> str:
    name, unit = text(data.get("tokenizer"), ""), text(data.get("unit"), "")
    return _joined(name, f"losses per {unit}" if unit else "")


def _source(data: Record) -> str:
    files = finite(data.get("files"))
    return _joined(text(data.get("source"), ""), f"{files:,.0f} files" if files else "")


def _sizes(data: Record) -> str:
    sizes = (
        (label, finite(data.get(key)))
        for label, key in (("", "bytes"), ("train ", "train_bytes"), ("valid ", "valid_bytes"))
    )
    return _joined(*(f"{label}{words.byte_count(size)}" for label, size in sizes if size is not None))
