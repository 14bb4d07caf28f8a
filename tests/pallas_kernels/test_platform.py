"""Which implementation runs: the named one or none, never silently another."""

import jax
import jax.numpy as jnp
import pytest
from visible import everyone

from pallas_kernels.dense_mla.api import dense_mla
from pallas_kernels.expert_mlp.api import expert_mlp
from pallas_kernels.indexer.api import index_scores
from pallas_kernels.indexer_loss.api import dense_indexer_loss, sparse_indexer_loss
from pallas_kernels.platform import UnsupportedError, choose, interpreted, target
from pallas_kernels.sparse_mla.api import sparse_mla
from pallas_kernels.topk.api import select, topk_indices, topk_mask

Z = jnp.zeros
INDEX = Z((1, 2, 1, 4)), Z((1, 2, 4)), Z((1, 2, 1))
INDICES, EVERYONE = Z((1, 2, 1), jnp.int32), everyone(1, 2, 2)
CALLS = {
    "dense_mla": (dense_mla, (Z((1, 1, 2, 4)),) * 3 + (EVERYONE,), {"scale": 1.0}),
    "expert_mlp": (
        expert_mlp,
        (Z((2, 4)), Z((2, 1), jnp.int32), Z((2, 1)), Z((1, 4, 8)), Z((1, 4, 8)), Z((1, 8, 4))),
        {},
    ),
    "index_scores": (index_scores, (*INDEX, EVERYONE), {}),
    "dense_indexer_loss": (
        dense_indexer_loss,
        (Z((1, 2, 2)), Z((1, 1, 2, 4)), Z((1, 1, 2, 4)), Z((1, 1, 2)), EVERYONE),
        {"scale": 1.0},
    ),
    "sparse_indexer_loss": (
        sparse_indexer_loss,
        (*INDEX, Z((1, 2, 1, 4)), Z((1, 2, 4)), Z((1, 2, 1)), INDICES),
        {"scale": 1.0},
    ),
    "sparse_mla": (sparse_mla, (Z((1, 2, 1, 4)), Z((1, 2, 4)), INDICES), {"latent_dim": 2, "scale": 1.0}),
    "topk_mask": (topk_mask, (Z((1, 2, 2)), 1), {}),
    "topk_indices": (topk_indices, (Z((1, 2, 2)), 1), {}),
    "select": (select, (Z((1, 2, 2)), 1), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_unknown_implementation_is_refused_with_the_names_of_those_there_are(name):
    function, arguments, options = CALLS[name]
    jax.block_until_ready(function(*arguments, **options, implementation="reference"))
    with pytest.raises(UnsupportedError, match=rf"{name} has no implementation 'cuda'.*'reference'"):
        function(*arguments, **options, implementation="cuda")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU chooses")
def test_the_platform_chooses_where_the_caller_does_not():
    functions = {"reference": lambda: "reference", "gpu": lambda: "gpu"}
    assert (target(), choose("op", None, functions)()) == ("cpu", "reference")
    with interpreted("gpu"):
        assert (target(), choose("op", None, functions)()) == ("gpu", "gpu")
        assert choose("op", "gpu", functions)() == "gpu"
        assert choose("op", "reference", functions)() == "reference"
    with interpreted("tpu"):
        assert choose("op", None, functions)() == "reference"


def test_a_kernel_of_another_platform_is_refused():
    functions = {"reference": lambda: "reference", "gpu": lambda: "gpu"}
    with pytest.raises(
        UnsupportedError, match=r"op: the implementation 'gpu' does not run on cpu.*interpreted\('gpu'\)"
    ):
        choose("op", "gpu", functions)


def test_a_program_traced_before_is_traced_again_for_another_platform():
    @jax.jit
    def platform_is_tpu(x):
        return x + (target() == "tpu")

    assert platform_is_tpu(0) == 0
    with interpreted("tpu"):
        assert platform_is_tpu(0) == 1
    assert platform_is_tpu(0) == 0


class Device:
    """What jax says of a device that is not here."""

    def __init__(self, kind: str):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("platform", "kind", "fits"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", True),
        ("gpu", "NVIDIA H200", True),
        ("gpu", "NVIDIA A100-SXM4-80GB", False),
        ("gpu", "NVIDIA B200", False),
        ("gpu", "AMD Instinct MI300X", False),
        ("tpu", "TPU v4", False),
        ("tpu", "TPU v5p", True),
        ("tpu", "TPU v6 lite", True),
        ("tpu", "TPU7x", True),
    ],
)
def test_a_device_that_the_kernels_are_not_made_for(monkeypatch, platform, kind, fits):
    """It runs the reference, or says why it does not run what was named."""
    functions = {"reference": lambda: "reference", "gpu": lambda: "gpu", "tpu": lambda: "tpu"}
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [Device(kind)])
    assert choose("op", None, functions)() == (platform if fits else "reference")
    if fits:
        assert choose("op", platform, functions)() == platform
    else:
        with pytest.raises(
            UnsupportedError, match=rf"op: the implementation '{platform}' .*{kind}.*use None"
        ):
            choose("op", platform, functions)
