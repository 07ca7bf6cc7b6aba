"""``python -m appo`` and ``accelerate launch -m appo``."""

from .cli import main

main()
