"""What a run leaves on disk: its folder, and the checkpoint (safetensors)."""

from coraq.artifact.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from coraq.artifact.folder import RunFolder, newest_run, read_result

__all__ = ["Checkpoint", "RunFolder", "load_checkpoint", "newest_run", "read_result", "write_checkpoint"]
