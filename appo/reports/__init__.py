"""What the report and inspection pages share: reading run folders, charts, and the shell of a self-contained page."""
