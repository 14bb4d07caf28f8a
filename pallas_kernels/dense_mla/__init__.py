"""Attention in MHA form under a mask: short sequences, V3 models, indexer warm-up."""
