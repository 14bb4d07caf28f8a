"""Attention of one to a few new tokens of each sequence over a cache in pages."""
