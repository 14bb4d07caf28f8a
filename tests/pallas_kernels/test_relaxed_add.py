"""Atomic addition in no order, which takes jax's internals to be as they are."""

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.relaxed_add import relaxed_add


def test_the_rule_of_jax_takes_the_word(monkeypatch):
    """Of this jax: a kernel is lowered with "relaxed", and Pallas's own addition still with its order."""
    from jax._src.lib import triton as dialect

    orders, emit = [], dialect.dialect.atomic_rmw

    def noted(*operands, **how):
        orders.append(how["sem"].name)
        return emit(*operands, **how)

    monkeypatch.setattr(dialect.dialect, "atomic_rmw", noted)

    def kernel(x, out):
        relaxed_add()(out, (pl.ds(0, 16),), x[:])
        triton.atomic_add(out, (pl.ds(0, 16),), x[:])

    def add(x):
        out = jax.ShapeDtypeStruct((16,), jnp.float32)
        return pl.pallas_call(kernel, out_shape=out, compiler_params=triton.CompilerParams())(x)

    with _of_an_h100():
        jax.jit(add).trace(jax.ShapeDtypeStruct((16,), jnp.float32)).lower(lowering_platforms=("cuda",))
    assert orders == ["RELAXED", "ACQUIRE_RELEASE"]


def test_without_one_of_those_internals_pallas_adds(monkeypatch, request):
    request.addfinalizer(relaxed_add.cache_clear)
    relaxed_add.cache_clear()
    monkeypatch.delattr("jax._src.pallas.triton.primitives._atomic_lowering_rule")
    assert relaxed_add() is triton.atomic_add


def _of_an_h100() -> contextlib.AbstractContextManager:
    """What newer versions of jax ask about the device before they lower for one that is not there."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 1, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))
