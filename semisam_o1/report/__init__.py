"""Metrics and pictures of labels, and the report."""
