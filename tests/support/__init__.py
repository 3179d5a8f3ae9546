"""What test modules share: factories for tasks, problems, checkpoints and results, and checks."""

from pathlib import Path

import pytest

# so that an assertion in these modules says what it compared, as one in a test module does
pytest.register_assert_rewrite(*(f"support.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py")))
