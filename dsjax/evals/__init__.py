"""Measuring what a model can do."""
