"""Text in, batches out: documents are found, split, tokenised once a workdir, and cut into windows.

``prepare`` -> ``train_batches``, ``heldout_batches``. The room knows numpy, tokenizers and grain, not jax.
"""

from dsjax.data.loader import heldout_batches as heldout_batches
from dsjax.data.loader import train_batches as train_batches
from dsjax.data.preparation import PreparedData as PreparedData
from dsjax.data.preparation import prepare as prepare
from dsjax.data.tokenizer import Tokenizer as Tokenizer
from dsjax.data.tokenizer import load_tokenizer as load_tokenizer
from dsjax.data.tokenizer import train_tokenizer as train_tokenizer
from dsjax.data.windows import Batch as Batch
