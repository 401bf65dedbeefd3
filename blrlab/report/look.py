"""The page's stylesheet: the report's colours as CSS variables, for light and for dark."""

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
}


def _variables(colours: dict[str, str], page: str) -> str:
    return "".join(f"--{name}: {colour}; " for name, colour in colours.items()) + f"--page: {page};"


STYLESHEET = (
    f":root {{ color-scheme: light dark; {_variables(COLOURS, '#f4f6f8')} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK, '#0d1117')} }} }}\n"
    """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1020px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { margin: 0 0 4px; font-size: 15px; font-weight: 600; color: var(--muted); }
h2 { margin: 44px 0 12px; font-size: 20px; line-height: 1.25; }
.answer { margin: 12px 0; font-size: 22px; line-height: 1.4; text-wrap: pretty; }
.answer b { display: block; font-size: 14px; color: var(--muted); }
.aside, .note { margin: 6px 0; color: var(--muted); }
.note { margin: 2px 0; font-size: 13px; }
figure, .card { margin: 0 0 18px; padding: 18px 20px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; }
figcaption { margin: 0 0 10px; font-size: 13.5px; color: var(--muted); }
figcaption b, h3 { display: block; margin: 0 0 2px; font-size: 15px; color: var(--ink); }
h3 { margin-bottom: 8px; }
svg { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 0 3px 14px; text-align: left; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; padding: 3px 4px 3px 0; background: var(--card); }
th { vertical-align: bottom; line-height: 1.3; font-weight: 600; color: var(--muted);
  border-bottom: 1px solid var(--muted); }
.n { text-align: right; }
tr.opens + tr.opens td, tr.opens:not(:first-child) td { border-top: 1px solid var(--rule); padding-top: 6px; }
.wraps td { white-space: normal; overflow-wrap: anywhere; min-width: 140px; }
.wraps td:first-child { min-width: 0; white-space: nowrap; color: var(--muted); }
@media (max-width: 720px) {
  main { padding: 24px 12px 40px; }
  .answer { font-size: 18px; }
  figure, .card { padding: 14px 12px; }
  .wide { display: none; }
  .narrow { display: block; }
}
@media print { body { background: none; } figure, .card { break-inside: avoid; } }
"""
)
