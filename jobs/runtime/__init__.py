"""The Ray session, progress reports and failure reports."""
