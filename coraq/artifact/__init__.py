"""What a run leaves on disk: its folder, and the checkpoint (safetensors)."""

from coraq.artifact.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from coraq.artifact.folder import RunFolder, newest_run, read_result
from coraq.artifact.histograms import read_histograms, weight_histogram, write_histograms
from coraq.artifact.predictions import Predictions, read_predictions, write_predictions

__all__ = [
    "Checkpoint",
    "Predictions",
    "RunFolder",
    "load_checkpoint",
    "newest_run",
    "read_histograms",
    "read_predictions",
    "read_result",
    "weight_histogram",
    "write_checkpoint",
    "write_histograms",
    "write_predictions",
]
