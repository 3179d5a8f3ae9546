"""`coraq` and `python -m coraq`: the command, imported where an interrupt is already understood."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `coraq` script."""
    try:
        from coraq.cli import app
    except KeyboardInterrupt:  # importing takes a moment; afterwards `app` answers for itself
        print("error: interrupted\nhint: nothing was begun", file=sys.stderr)
        sys.exit(130)
    app.main()


if __name__ == "__main__":
    main()
