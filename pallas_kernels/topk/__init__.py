"""Exact selection of the k best keys of every query."""
