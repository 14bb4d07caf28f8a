"""The operations that decide the speed of DeepSeek-V3.2, each with a plain-JAX contract. Imports jax only.

One folder an operation: ``api.py`` is what everyone calls, ``reference.py`` is the contract and what CPUs run;
``tpu.py`` and ``gpu.py`` stand beside it where a kernel exists.
"""
