"""The report's figures, as matplotlib `Figure` objects: no global state, nothing written."""
