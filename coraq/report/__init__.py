"""Reports rendered from a RunResult alone. Cheap to import: no torch."""

from coraq.report.render import markdown, write_report

__all__ = ["markdown", "write_report"]
