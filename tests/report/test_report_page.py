"""The page: well formed, complete in itself, safe against what records hold."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser

import pytest

from blrlab.report import write_html
from blrlab.report.page import page

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Outline(HTMLParser):
    """Collects what a browser would see, and fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.labels: list[str] = []
        self.headings: dict[int, list[str]] = {1: [], 2: [], 3: []}
        self.order: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            self.ids += [value] if key == "id" else []
            self.labels += [value] if key == "aria-label" else []
            self.links += [value] if key in ("href", "src", "xlink:href") else []
            assert not key.startswith("on")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and re.fullmatch("h[123]", self.open[-1]):
            self.headings[int(self.open[-1][1])].append(data)
            self.order.append(int(self.open[-1][1]))
        self.words += [data.strip()] if data.strip() and self.open[-1] != "style" else []

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def whole(build) -> str:
    return page(build.full_run())


def test_page_is_well_formed_and_opens_with_the_answer(whole):
    outline = Outline(whole)
    assert whole.startswith("<!doctype html>")
    assert outline.text.index("96 % of the loss won back") < outline.text.index("Figures")
    assert outline.text.index("Figures") < outline.text.index("Tables") < outline.text.index("Provenance")
    assert "1.520 → 2.310 nats/byte" in outline.text


def test_page_holds_every_figure_twice_and_every_table(whole):
    outline = Outline(whole)
    kinds = r"Loss over|Error of|Loss against|Speed over|(Speed of .*|Latency .*){4}|Roofline"
    figures = re.findall(r"<figure>.*?<h3>(.*?)</h3>", whole, re.DOTALL)
    assert re.fullmatch(f"(({kinds}).*)+", "".join(figures))
    assert len(figures) == 9
    assert outline.tags.count("svg") == 2 * outline.tags.count("figure") == 2 * len(figures)
    # Data under each figure; quality, compression, means, latency and provenance of their own.
    assert outline.tags.count("table") == len(figures) + 5


def test_headings_come_in_order_and_links_lead_on(whole):
    outline = Outline(whole)
    assert [len(outline.headings[level]) for level in (1, 2)] == [1, 3]
    steps = zip(outline.order, outline.order[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps)
    assert "#content" in outline.links
    assert {f"#{name}" for name in ("figures", "tables", "provenance", "figure-1", "table-1")} <= set(outline.links)


def test_every_drawing_is_a_named_image_and_every_table_can_be_scrolled_by_keyboard(whole):
    drawings = re.findall(r"<svg[^>]*>", whole)
    assert all('role="img"' in tag and "aria-label=" in tag and "aria-describedby=" in tag for tag in drawings)
    assert whole.count('role="region" tabindex="0" aria-label=') == whole.count("<table")
    assert whole.count("<details>") == whole.count("<summary>") > 9


def test_marks_say_what_they_are(whole):
    assert re.search(r"<title>own c_fc 256 x 1024, dense PyTorch, 256 tokens: p50 [\d,]+ us \(p20-p80 ", whole)
    assert "% of the roof</title>" in whole


def test_page_needs_nothing_from_elsewhere(whole):
    outline = Outline(whole)
    assert "script" not in outline.tags
    assert "link" not in outline.tags
    assert "@import" not in whole
    assert all(link.startswith("#") for link in outline.links)
    assert "http" not in whole


def test_ids_are_unique_and_every_reference_has_its_target(whole):
    outline = Outline(whole)
    assert len(outline.ids) == len(set(outline.ids))
    wanted = {link[1:] for link in outline.links} | set(re.findall(r"url\(#([^)]+)\)", whole))
    wanted |= set(re.findall(r'aria-describedby="([^"]+)"', whole))
    assert wanted
    assert wanted <= set(outline.ids)


def test_colours_follow_light_and_dark(whole):
    figures = "".join(re.findall(r"<svg.*?</svg>", whole, re.DOTALL))
    assert "prefers-color-scheme: dark" in whole
    assert 'class="s-ink"' in figures
    assert re.findall(r"#[0-9a-fA-F]{6}\b", figures) == []


def test_provenance_names_machine_versions_and_data(whole):
    text = Outline(whole).text
    for fact in (
        "4be1c07",
        "jax 0.9.1",
        "driver absent",
        "1,612 files",
        "9f2c51d07ab34e81",
        "118 GFLOP/s float32",
        "3.291 nats",
    ):
        assert fact in text


def test_hostile_words_stay_words(build):
    evil = "<script>alert('x')</script>\"><b onload=1>$x_{$"
    records = [
        {
            **r,
            **{key: evil for key in ("path", "layer", "device", "config", "net", "reason", "source") if key in r},
        }
        for r in build.full_run()
    ]
    outline = Outline(page(records))
    assert "script" not in outline.tags
    assert evil in outline.text


@pytest.mark.parametrize("kind", ["env", "train", "compress", "eval", "bench"])
def test_page_copes_without_a_kind(build, kind):
    records = [r for r in build.full_run() if r["kind"] != kind]
    absent = {
        "env": "No environment was recorded.",
        "train": "No training was recorded.",
        "compress": "No layer was compressed.",
        "eval": "its loss is not evaluated",
        "bench": "Provenance",
    }
    assert absent[kind] in Outline(page(records)).text


def test_page_copes_with_nothing_and_with_nulls(build):
    assert "There is nothing to report" in Outline(page([])).text
    nulls = [{key: value if key == "kind" else None for key, value in r.items()} for r in build.full_run()]
    assert "Provenance" in Outline(page(nulls)).text


def test_two_data_sets_are_two_tables_and_named_figures(build):
    other = [
        build.env(config="gpt2_blast", data={"hash": "feedbeef"}),
        *build.evaluation("dense", 7.125, "feedbeef"),
    ]
    first = [r for r in build.full_run() if r["kind"] != "bench"]
    text = Outline(page([*first, *other])).text
    # Once in the contents, once above the table.
    assert text.count("Quality on valid") == 4
    assert "Loss over steps: gpt2_monarch" in text


def test_page_is_written_whole_and_leaves_nothing_beside_it(build, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    assert write_html(build.evaluation("dense", 1.0), target) == target
    before = target.read_text(encoding="utf-8")

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="no space left"):
        write_html(build.evaluation("dense", 2.0), target)
    assert target.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [target]


def test_the_same_records_give_the_same_page(build):
    records = [build.env(), *build.train("dense", 50, 5.0, 2.0), *build.compression()]
    assert page(records) == page(records)
