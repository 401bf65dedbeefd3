"""The report's figures, drawn as SVG: no state, nothing written."""
