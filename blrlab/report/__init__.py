"""Tables, figures and one page out of a run's JSON records.

Records are lists of plain dicts, one `kind` each: env, train, compress, eval, bench. Every number shown
is one of theirs or derived from them alone; what they lack is left out with a short sentence. Nothing
here needs JAX, PyTorch or the machine that the run was on.

    from blrlab.report import print_report, write_html
"""

from blrlab.report.page import write_html
from blrlab.report.terminal import print_report

__all__ = ["print_report", "write_html"]
