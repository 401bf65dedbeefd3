"""The page in a real browser, headless: widths, colours, console, paper. Left out where there is no Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from blrlab.report import write_html

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: install it to see the report in a browser")

# Measures the page inside frames, since the page itself has no script: what is wider than it may be, what is shown.
PROBE = """<!doctype html><body style="margin:0"><script>
const widths = [360, 1100], found = {};
let left = widths.length;
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0;display:block`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    const drawings = [...page.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 0);
    const clipped = drawings.flatMap((svg) => {
      const edge = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("text")].filter((text) => {
        const box = text.getBoundingClientRect();
        return box.left < edge.left - 2 || box.right > edge.right + 2 || box.top < edge.top - 2 ||
          box.bottom > edge.bottom + 2;
      }).map((text) => text.textContent);
    });
    const skip = page.querySelector(".skip"), summary = page.querySelector("figure + details summary");
    skip.focus();
    const skipLeft = skip.getBoundingClientRect().left;
    summary.focus();
    found[width] = {
      scroll: Math.max(root.scrollWidth, page.body.scrollWidth),
      drawings: drawings.length,
      classes: [...new Set(drawings.map((svg) => svg.parentElement.className))],
      figures: page.querySelectorAll("figure").length,
      clipped,
      skipLeft,
      focused: page.activeElement === summary,
      page: getComputedStyle(page.body).backgroundColor,
      ink: getComputedStyle(page.body).color,
      text: getComputedStyle(drawings[0].querySelector("text")).fill,
      closed: [...page.querySelectorAll("figure + details")].every((details) => !details.open),
    };
    if (--left == 0) document.body.textContent = JSON.stringify(found);
  };
  frame.src = "report.html";
  document.body.append(frame);
}
</script>"""


def browse(folder, *arguments):
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--no-first-run"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, build):
    folder = tmp_path_factory.mktemp("page")
    write_html([*build.full_run(), *build.evaluated_suite(), *build.suite(2)], folder / "report.html")
    (folder / "probe.html").write_text(PROBE, encoding="utf-8")
    return folder


def measured(folder, *arguments):
    address = (folder / "probe.html").as_uri()
    done = browse(folder, *arguments, "--window-size=1200,2000", "--virtual-time-budget=20000", "--dump-dom", address)
    return json.loads(unescape(re.search(r"<body[^>]*>(.*)</body>", done.stdout, re.DOTALL).group(1)))


@pytest.fixture(scope="module")
def light(folder):
    return measured(folder, "--blink-settings=preferredColorScheme=1")


@pytest.mark.parametrize("width", ["360", "1100"])
def test_the_page_is_never_wider_than_its_window(light, width):
    assert light[width]["scroll"] <= int(width)


def test_each_width_shows_its_own_drawings(light):
    assert light["360"]["classes"] == ["narrow"]
    assert light["1100"]["classes"] == ["wide"]
    assert light["360"]["drawings"] == light["1100"]["drawings"] == light["360"]["figures"] > 15


@pytest.mark.parametrize("width", ["360", "1100"])
def test_no_text_of_a_drawing_is_clipped(light, width):
    assert light[width]["clipped"] == []


def test_keyboards_reach_the_skip_link_and_the_data(light):
    found = light["1100"]
    assert found["skipLeft"] >= 0
    assert found["focused"]
    assert found["closed"]


def test_dark_mode_turns_page_and_drawings(folder, light):
    dark = measured(folder, "--blink-settings=preferredColorScheme=0")

    def brightness(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert brightness(light["1100"]["page"]) > 200 > 60 > brightness(light["1100"]["text"])
    assert brightness(dark["1100"]["page"]) < 40 < 200 < brightness(dark["1100"]["text"])
    assert dark["1100"]["ink"] == dark["1100"]["text"]


def test_nothing_complains_on_the_console(folder):
    done = browse(folder, "--enable-logging=stderr", "--dump-dom", (folder / "report.html").as_uri())
    assert "<h1>blrlab report</h1>" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_paper_shows_the_folded_data(folder):
    def pages(name, content):
        (folder / name).write_text(content, encoding="utf-8")
        browse(folder, f"--print-to-pdf={folder / 'page.pdf'}", (folder / name).as_uri())
        return len(re.findall(rb"/Type\s*/Page\b", (folder / "page.pdf").read_bytes()))

    text = (folder / "report.html").read_text(encoding="utf-8")
    without = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert pages("whole.html", text) > 1.5 * pages("short.html", without)
