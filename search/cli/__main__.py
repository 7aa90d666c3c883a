"""The same as the console script: ``python -m secateur.search.cli``."""

from secateur.search.cli import main

main()
