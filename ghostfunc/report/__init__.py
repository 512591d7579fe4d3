"""The report: queries with the passages that support and oppose them, as one self-contained HTML page."""
