"""The report and inspection pages: reading run folders, charts, and the shell of a self-contained page."""
