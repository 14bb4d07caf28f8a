"""The contract of the FP8 product, in plain jnp: a loop over the blocks of the contraction."""

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import pad_axis
from pallas_kernels.shapes import Array, Float

BLOCK = 128  # of the contraction that share a scale; the last may be shorter


def fp8_matmul(
    x: Float[Array, "M K"],
    x_scale: Float[Array, "M k"],
    w: Float[Array, "K N"] | Float[Array, "N K"],
    w_scale: Float[Array, "k n"] | Float[Array, "k N"],
    transposed: bool,
    out_dtype,
) -> Float[Array, "M N"]:
    """See ``api.fp8_matmul``; scales of w as w multiplies."""
    axis = 1 if transposed else 0  # of w that is summed over
    w_scale = scales_of_columns(w_scale, w.shape[1 - axis])
    x, w = pad_axis(x, 1, BLOCK), pad_axis(w, axis, BLOCK)
    contract = (((1,), (axis,)), ((), ()))

    def add_block(b, total):
        left = jax.lax.dynamic_slice_in_dim(x, b * BLOCK, BLOCK, 1).astype(jnp.float32)
        right = jax.lax.dynamic_slice_in_dim(w, b * BLOCK, BLOCK, axis).astype(jnp.float32)
        products = jax.lax.dot_general(
            left, right, contract, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return total + products * x_scale[:, b, None] * w_scale[b]

    total = jnp.zeros((x.shape[0], w_scale.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, w_scale.shape[0], add_block, total).astype(out_dtype)


def scales_of_columns(
    w_scale: Float[Array, "k n"] | Float[Array, "k N"], columns: int
) -> Float[Array, "k N"]:
    """One for each column, of scales that may be those of blocks of columns."""
    return w_scale if w_scale.shape[1] == columns else jnp.repeat(w_scale, BLOCK, axis=1)[:, :columns]
