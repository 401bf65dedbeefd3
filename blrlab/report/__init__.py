"""Tables, figures and one page out of a run's JSON records.

Records are lists of plain dicts, one `kind` each: env, train, allocate, compress, eval, bench, counters, and of
predictions bound, advice and extrapolation. Every number shown is one of theirs or derived from them alone; what they
lack is left out with a short sentence. Nothing here needs JAX, PyTorch or the machine that the run was on.

    from blrlab.report import print_report, write_html, write_figures, markdown
"""

from blrlab.report.figures import write_figures
from blrlab.report.markdown import markdown
from blrlab.report.page import write_html
from blrlab.report.terminal import print_report

__all__ = ["markdown", "print_report", "write_figures", "write_html"]
