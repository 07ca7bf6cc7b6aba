"""``python -m appo`` and ``accelerate launch -m appo``."""

from appo.cli import main

main()
