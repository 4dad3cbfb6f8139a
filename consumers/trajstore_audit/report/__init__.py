"""The audit's report: one HTML file that needs nothing else, to read, print and send to a colleague."""

from trajstore_audit.report.page import render_report

__all__ = ["render_report"]
