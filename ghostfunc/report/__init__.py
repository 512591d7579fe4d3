"""The report: queries with the passages that support and oppose them, as one self-contained HTML page."""

from ghostfunc.report._collect import collect_report
from ghostfunc.report._data import Distribution, DomainMeans, Highlights, Passage, Query, ReportData, Spread
from ghostfunc.report._render import render
from ghostfunc.report._tokens import TokenScores, token_scores
from ghostfunc.report._write import write_report

__all__ = [
    "Distribution",
    "DomainMeans",
    "Highlights",
    "Passage",
    "Query",
    "ReportData",
    "Spread",
    "TokenScores",
    "collect_report",
    "render",
    "token_scores",
    "write_report",
]
