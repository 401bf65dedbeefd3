"""The page's stylesheet: the report's colours as CSS variables, for light and for dark, and the rules for paper."""

from blrlab.report.plots.style import COLOURS

DARK = {
    "ink": "#e4e8ee",
    "muted": "#9aa6b5",
    "rule": "#2c3541",
    "card": "#151b23",
    "slate": "#8f9bab",
    "blue": "#4aa3e0",
    "sky": "#93d2f6",
    "orange": "#f0b53c",
    "vermilion": "#f27a3d",
    "green": "#33c596",
    "purple": "#d28ad0",
    "navy": "#8c9df2",
    "teal": "#3fbcc4",
    "brown": "#cb9a68",
    "pink": "#ee8fbd",
    "olive": "#bcc648",
}


def _variables(colours: dict[str, str], page: str) -> str:
    return "".join(f"--{name}: {colour}; " for name, colour in colours.items()) + f"--page: {page};"


# The classes by which drawings name their colours: f-<colour> fills, s-<colour> strokes.
_CLASSES = "".join(f"svg .f-{c} {{ fill: var(--{c}); }} svg .s-{c} {{ stroke: var(--{c}); }}\n" for c in COLOURS)

# What a drawing takes its colours and letters from, on the page or on its own.
DRAWINGS = (
    f":root {{ color-scheme: light dark; {_variables(COLOURS, '#f4f6f8')} }}\n"
    # Paper is light, whatever the screen is.
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, '#0d1117')} }} }}\n"
    + """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
svg text { font-family: var(--font); fill: var(--ink); }
svg .b { font-weight: 600; }
.t8 { font-size: 8px; } .t9 { font-size: 9px; } .t10 { font-size: 10px; }
.t11 { font-size: 11px; } .t12 { font-size: 12px; }
svg path { fill: none; }
"""
    + _CLASSES
)

STYLESHEET = (
    DRAWINGS
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1022px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { margin: 0 0 4px; font-size: 15px; font-weight: 600; color: var(--muted); }
h2 { margin: 44px 0 12px; font-size: 20px; line-height: 1.25; }
a { color: inherit; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 12px; top: 12px; padding: 6px 12px; background: var(--card); z-index: 1; }
.answer { margin: 12px 0; font-size: 22px; line-height: 1.4; text-wrap: pretty; }
.answer b { display: block; font-size: 14px; color: var(--muted); }
.aside, .note { margin: 6px 0; color: var(--muted); overflow-wrap: anywhere; }
.note { margin: 2px 0; font-size: 13px; }
nav { margin: 18px 0 0; font-size: 14px; }
nav ul { margin: 4px 0; padding-left: 20px; overflow-wrap: anywhere; }
figure { margin: 0; }
.card { margin: 0 0 18px; padding: 18px 20px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
figcaption p { margin: 0 0 12px; font-size: 13.5px; color: var(--muted); overflow-wrap: anywhere; }
h3 { margin: 0 0 2px; font-size: 15px; overflow-wrap: anywhere; }
.card > h3 { margin-bottom: 8px; }
summary { padding: 4px 0; font-size: 13px; color: var(--muted); cursor: pointer; }
figure + details { margin-top: 8px; }
svg { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 0 3px 14px; text-align: left; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; padding: 3px 4px 3px 0; background: var(--card); }
th { vertical-align: bottom; line-height: 1.3; font-weight: 600; color: var(--muted);
  border-bottom: 1px solid var(--muted); }
.n { text-align: right; }
.prose { white-space: normal; min-width: 240px; }
tr.opens + tr.opens td, tr.opens:not(:first-child) td { border-top: 1px solid var(--rule); padding-top: 6px; }
.wraps td { white-space: normal; overflow-wrap: anywhere; min-width: 140px; }
.wraps td:first-child { min-width: 0; white-space: nowrap; color: var(--muted); }
@media screen and (max-width: 720px) {
  main { padding: 24px 12px 40px; }
  .answer { font-size: 18px; }
  .card { padding: 14px 12px; }
  .wide { display: none; }
  .narrow { display: block; }
}
@media print {
  @page { margin: 12mm; }
  body { background: none; font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .skip, nav { display: none; }
  .card { padding: 8px 0; border: 0; border-top: 1px solid var(--rule); border-radius: 0; }
  h2, h3 { break-after: avoid; }
  figure { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; max-width: 100%; }
  th, td { padding-left: 7px; white-space: normal; }
  th:first-child, td:first-child { position: static; }
  .answer { font-size: 14pt; }
  tr { break-inside: avoid; }
  /* What is folded away on the screen is not on paper. */
  details::details-content { content-visibility: visible; block-size: auto; }
  details > summary { list-style: none; }
}
"""
)
