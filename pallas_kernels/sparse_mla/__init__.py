"""Attention in MQA form over the selected keys only."""
