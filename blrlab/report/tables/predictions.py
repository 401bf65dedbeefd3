"""Tables of what the cost model predicts: times of algorithms, and which ranks it advises."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped, text
from blrlab.report.summary.advice import Advice, choose, in_words
from blrlab.report.summary.bounds import TERMS, by_shape, fastest, term_times
from blrlab.report.tables.table import Column, Table

PREDICTIONS = (
    Column("layer", 0, False, group=True),
    Column("in x out", 5, False, group=True),
    Column("tokens", 0, group=True),
    Column("dtype", 8, False, group=True),
    Column("op", 0, False),
    Column("algorithm", 0, False),
    Column("blocks", 3, False),
    Column("rank", 2),
    Column("predicted\nus"),
    Column("mostly", 0, False),
    Column("launches", 6),
    *(Column(f"{words.TERMS[term]}\nus", 7) for term in TERMS),
    Column("bound\nus", 1),
    Column("x dense"),
)
MOST_ROWS = 400


def prediction_table(device: str, records: list[Record], most: int = MOST_ROWS) -> Table:
    """Return the predicted times on one device; past `most` rows, of every op the fastest algorithm only."""
    shapes = by_shape(records)
    thinned = len(records) > most
    rows: list[tuple[str, ...]] = []
    breaks: set[int] = set()
    for found in shapes.values():
        breaks.add(len(rows))
        rows += [_cells(r) for r in (fastest(found) if thinned else found)]
    table = Table(f"Predicted times on {device}", PREDICTIONS, tuple(rows), frozenset(breaks))
    table = table.without_empty(["layer", "op", "algorithm", "predicted\nus"]).say_once(["dtype"])
    note = f"Of {len(records):,} predictions, the fastest algorithm of every op is shown."
    return table.noted(
        *([note] if thinned else []),
        "Predictions are least times of the cost model, not measurements; x dense is a ratio of two, an estimate.",
    )


def _cells(record: Record) -> tuple[str, ...]:
    terms = term_times(record)
    return (
        f"{text(record.get('net'), '')} {text(record.get('layer'))}".strip(),
        words.shape(record),
        f"{n:,.0f}" if (n := finite(record.get("tokens"))) is not None else words.MISSING,
        text(record.get("dtype"), words.MISSING),
        words.name(words.FORMATS, record.get("op")),
        text(record.get("algorithm"), words.MISSING).replace("_", " "),
        words.blocks(record.get("blocks")),
        words.span([v for v in [finite(record.get("rank"))] if v is not None]),
        words.microseconds(finite(record.get("us"))),
        words.name(words.TERMS, record.get("term")),
        words.span([v for v in [finite(record.get("launches"))] if v is not None]),
        *(words.microseconds(terms.get(term)) for term in TERMS),
        words.microseconds(finite(record.get("bound_us"))),
        words.factor(finite(record.get("speedup"))),
    )


def advice_table(device: str, found: list[Advice], one_each: bool = False) -> Table:
    """Return one sentence of advice per layer, op and blocks of a device, or of each layer and op one."""
    columns = (
        Column("layer", 0, False, group=True),
        Column("op", 0, False),
        Column("highest", 2),
        Column("advice", 0, False, prose=True),
    )
    shown = choose(found, len(found))[0] if one_each else found
    rows: list[tuple[str, ...]] = []
    breaks: set[int] = set()
    for layer, members in grouped(shown, lambda advice: advice.layer).items():
        breaks.add(len(rows))
        for advice in members:
            best = max((v for row in advice.speedup for v in row if v), default=None)
            rows.append((layer, advice.op, words.factor(best), in_words(advice)))
    more = len(found) - len(shown)
    note = ["highest: of the predicted speeds over dense, a ratio of least times: an estimate, not a limit."]
    note += [f"At one number of blocks a layer and format; {more} more are on the page."] if more else []
    return Table(f"Advice for {device}, predicted", columns, tuple(rows), frozenset(breaks), tuple(note))


def advice_data(found: list[Advice]) -> tuple[Table, ...]:
    """Return the data of the heat maps, a table each: a row per number of tokens, a column per rank."""
    return tuple(
        Table(
            f"{advice.layer}, {advice.op}: predicted speed over dense",
            (Column("tokens"), *(Column(f"rank\n{rank:g}") for rank in advice.ranks), Column("widest rank\nthat wins")),
            tuple(
                (
                    f"{tokens:,.0f}",
                    *(words.factor(value) for value in values),
                    words.MISSING if widest is None else f"{widest:g}",
                )
                for tokens, values, widest in zip(advice.tokens, advice.speedup, advice.widest, strict=True)
            ),
        )
        for advice in found
    )
