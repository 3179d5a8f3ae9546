"""`coraq` and `python -m coraq`: the command, imported where an interrupt is already understood."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of the `coraq` script."""
    # Where another program has one of the cores, threads that wait for each other burn the rest: the demo on two cores
    # took 3 min 40 s instead of 19 s. It must be said before torch is loaded; the user's own wish stands.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from coraq.cli import app
    except KeyboardInterrupt:  # importing takes a moment; afterwards `app` answers for itself
        print("error: interrupted\nhint: nothing was begun", file=sys.stderr)
        sys.exit(130)
    app.main()


if __name__ == "__main__":
    main()
