"""The peer: transformers' model with the weights of ours, as a user of PyTorch on a CPU would run it."""

import sys
from pathlib import Path

import torch

from dsjax.models.transformer import Transformer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from transformers_model import hf_model


def build_peer(model: Transformer) -> torch.nn.Module:
    """Fused attention and grouped experts: transformers' fastest settings on a CPU, and its defaults."""
    peer = hf_model(model)
    peer.set_attn_implementation("sdpa")
    peer.set_experts_implementation("grouped_mm")
    return peer
