"""Text and progress on a terminal, for the commands and for `progress=True`."""
