"""The report: queries with the passages that support and oppose them, as one self-contained HTML page."""

from ghostfunc.report._data import Distribution, DomainMeans, Highlights, Passage, Query, ReportData, Spread
from ghostfunc.report._render import render
from ghostfunc.report._tokens import TokenScores, token_scores

__all__ = [
    "Distribution",
    "DomainMeans",
    "Highlights",
    "Passage",
    "Query",
    "ReportData",
    "Spread",
    "TokenScores",
    "render",
    "token_scores",
]
