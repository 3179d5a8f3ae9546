"""The flow: load → fold → calibrate and commit layer by layer → write → reload → evaluate → report.

Accuracy is measured on what was read back from disk, never on the object in memory.
"""

from __future__ import annotations

from coraq.pipeline.dry_run import Plan as Plan
from coraq.pipeline.dry_run import plan as plan
from coraq.pipeline.evaluation import evaluate_file as evaluate_file
from coraq.pipeline.evaluation import evaluate_run as evaluate_run
from coraq.pipeline.evaluation import run_of as run_of
from coraq.pipeline.flow import folder_name as folder_name
from coraq.pipeline.flow import run as run
from coraq.pipeline.python_api import Quantized as Quantized
from coraq.pipeline.python_api import load as load
from coraq.pipeline.python_api import quantize as quantize
