"""A matrix product of e4m3 operands with scales of blocks of 128."""

import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.fp8_matmul import gpu, reference, tpu
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.platform import UnsupportedError, choose
from pallas_kernels.shapes import Array, Float


def fp8_matmul(
    x: Float[Array, "*B M K"],
    x_scale: Float[Array, "*B M k"],
    w: Float[Array, "K N"] | Float[Array, "N K"],
    w_scale: Float[Array, "k n"] | Float[Array, "k N"] | Float[Array, "n k"] | Float[Array, "N k"],
    *,
    transposed: bool = False,
    out_dtype=jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "*B M N"]:
    """``y[m,n] = Σ_b x_scale[m,b] · w_scale[b,n'] · Σ_{k in b} x[m,k] w[k,n]`` for blocks b of 128, k = ⌈K/128⌉.

    ``x`` and ``w`` are float8_e4m3fn, scales float32: any numbers, not only powers of two, as long as the product of
    two is a normal one. Those of ``w`` belong to blocks of 128 × 128 (n' = n // 128), as weights have them, or of
    128 × 1 (n' = n), as the gradient of a weight needs, whose right factor is quantised along tokens too. Float32
    accumulation, promoted every 128 of the contraction; rounded once to ``out_dtype``. Blocks at the edges may be
    shorter.

    With ``transposed``, ``w`` is [N, K] and its scales [n, k] or [N, k]: the gradient of ``x`` with the weight as it
    lies, a checkpoint's [out, in] matrix, or operands quantised along tokens. GPUs read e4m3 along the contraction
    only and copy a matrix that is not transposed; TPUs read both alike.

    Not differentiable: what is quantised for a gradient, and how, is the caller's recipe.

    Raises UnsupportedError for other dtypes, and for sizes that do not fit one another.

    Source: V3 report §3.3.2; checkpoint keys ``*.weight`` and ``*.weight_scale_inv``.
    """
    _check_axes(x, x_scale, w, w_scale, transposed)
    out_dtype = checks.result_dtype("fp8_matmul", out_dtype)
    columns = w.shape[0 if transposed else 1]
    _check(x, x_scale, w.T if transposed else w, w_scale.T if transposed else w_scale)
    w_scale = w_scale.T if transposed else w_scale
    available = {"reference": reference.fp8_matmul, "tpu": tpu.fp8_matmul, "gpu": gpu.fp8_matmul}
    run = choose("fp8_matmul", implementation, available)
    rows, scales = x.reshape(-1, x.shape[-1]), x_scale.reshape(-1, x_scale.shape[-1])
    return run(rows, scales, w, w_scale, transposed, out_dtype).reshape(*x.shape[:-1], columns)


def _check_axes(x: Array, x_scale: Array, w: Array, w_scale: Array, transposed: bool) -> None:
    leading = len(getattr(x, "shape", ())) - 1
    before = "".join(f"B{i} " for i in range(leading))
    of_w, of_scale = ("N K", "n k") if transposed else ("K N", "k n")
    # By themselves: how widths meet is for ``_check``.
    checks.shapes("fp8_matmul", {"x": (x, before + "K"), "x_scale": (x_scale, before + "k")})
    checks.shapes("fp8_matmul", {"w": (w, of_w), "w_scale": (w_scale, of_scale)})


def _check(x: Array, x_scale: Array, w: Array, w_scale: Array) -> None:
    """Of w and its scales as they multiply."""
    if x.dtype != jnp.float8_e4m3fn or w.dtype != jnp.float8_e4m3fn:
        raise UnsupportedError(
            f"fp8_matmul multiplies float8_e4m3fn, not {x.dtype} by {w.dtype}: quantise both operands first"
        )
    if x_scale.dtype != jnp.float32 or w_scale.dtype != jnp.float32:
        raise UnsupportedError(
            f"fp8_matmul takes float32 scales, not {x_scale.dtype} and {w_scale.dtype}: convert them first"
        )
    if x.shape[-1] != w.shape[0]:
        raise UnsupportedError(
            f"fp8_matmul: rows of {x.shape[-1]} do not meet a matrix of {w.shape[0]} × {w.shape[1]}: say "
            "transposed=True for one that is stored [out, in]"
        )
    blocks, column_blocks = -(-x.shape[-1] // BLOCK), -(-w.shape[1] // BLOCK)
    if x_scale.shape != (*x.shape[:-1], blocks):
        raise UnsupportedError(
            f"fp8_matmul: x_scale is {list(x_scale.shape)} and must be {[*x.shape[:-1], blocks]}: one scale for each "
            f"{BLOCK} of a row of x"
        )
    if w_scale.shape not in ((blocks, column_blocks), (blocks, w.shape[1])):
        raise UnsupportedError(
            f"fp8_matmul: the scales of w are {list(w_scale.shape)} and must be {[blocks, column_blocks]} or "
            f"{[blocks, w.shape[1]]} (turned over where w is): one for each {BLOCK} × {BLOCK} or {BLOCK} × 1"
        )
