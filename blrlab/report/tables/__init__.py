"""The report's tables as plain text cells: the terminal and the page draw the same ones."""
