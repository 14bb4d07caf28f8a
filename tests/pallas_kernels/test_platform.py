"""Which implementation runs: the named one or none, never silently another."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.expert_mlp.api import expert_mlp
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.platform import choose
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.topk.api import topk_indices, topk_mask

Z = jnp.zeros
MASK, INDICES = Z((1, 2, 2), bool), Z((1, 2, 1), jnp.int32)
CALLS = {
    "dense_mla": (dense_mla, (Z((1, 1, 2, 4)),) * 3 + (MASK,), {"scale": 1.0}),
    "expert_mlp": (
        expert_mlp,
        (Z((2, 4)), Z((2, 1), jnp.int32), Z((2, 1)), Z((1, 4, 8)), Z((1, 4, 8)), Z((1, 8, 4))),
        {},
    ),
    "index_scores": (index_scores, (Z((1, 2, 1, 4)), Z((1, 2, 4)), Z((1, 2, 1))), {}),
    "dense_indexer_loss": (
        dense_indexer_loss,
        (Z((1, 2, 2)), MASK, Z((1, 1, 2, 4)), Z((1, 1, 2, 4)), Z((1, 1, 2))),
        {"scale": 1.0},
    ),
    "sparse_indexer_loss": (
        sparse_indexer_loss,
        (Z((1, 2, 2)), INDICES, Z((1, 2, 1, 4)), Z((1, 2, 4)), Z((1, 2, 1))),
        {"scale": 1.0},
    ),
    "sparse_mla": (sparse_mla, (Z((1, 2, 1, 4)), Z((1, 2, 4)), INDICES), {"latent_dim": 2, "scale": 1.0}),
    "topk_mask": (topk_mask, (Z((2, 2)), Z((2, 2), bool), 1), {}),
    "topk_indices": (topk_indices, (Z((2, 2)), Z((2, 2), bool), 1), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_implementation_is_refused_with_the_names_of_those_there_are(name):
    function, arguments, options = CALLS[name]
    jax.block_until_ready(function(*arguments, **options, implementation="reference"))
    with pytest.raises(ValueError, match=rf"{name} has no implementation 'cuda'.*'reference'"):
        function(*arguments, **options, implementation="cuda")


def test_the_platform_chooses_where_the_caller_does_not(monkeypatch):
    functions = {"reference": lambda: "reference", "gpu": lambda: "gpu"}
    for platform, expected in {"gpu": "gpu", "tpu": "reference", "cpu": "reference"}.items():
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert choose("op", None, functions)() == expected
        assert choose("op", "gpu", functions)() == "gpu"
        with pytest.raises(ValueError, match="op has no implementation 'tpu'"):
            choose("op", "tpu", functions)
