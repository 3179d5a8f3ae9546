"""What several test files need: the real networks and images of ../shared/assets, where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the networks here are too small to share among threads


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real networks and images beside the checkout; skips where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"the real networks and images of {folder} are not on this machine")
    return folder
