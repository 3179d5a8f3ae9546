"""Reports rendered from a RunResult or a CompareResult alone. Cheap to import: no torch, no matplotlib."""

from coraq.report.compare import compare_markdown, read_comparison, write_comparison
from coraq.report.render import markdown, write_report

__all__ = ["compare_markdown", "markdown", "read_comparison", "write_comparison", "write_report"]
