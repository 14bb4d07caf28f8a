"""Text in, batches out: documents are cleaned, tokenised once, and packed into windows.

``prepare.py`` (the command) or ``run_data.data_of_run`` -> ``loader.train_windows`` -> ``loader.train_batches`` and
``loader.heldout_batches``. The room knows numpy, tokenizers and grain, not jax.
"""
