"""`python -m coraq` is the `coraq` command."""

from coraq.cli.app import main

main()
