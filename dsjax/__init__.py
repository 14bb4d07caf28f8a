"""dsjax: DeepSeek-V3.2 in JAX and Flax NNX."""

__version__ = "0.1.0"
