"""Index scores of the lightning indexer."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.indexer import gpu, reference, tpu
from pallas_kernels.platform import UnsupportedError, choose
from pallas_kernels.shapes import Array, Float
from pallas_kernels.visibility import Visibility


def index_scores(
    q: Float[Array, "B T N J"],
    k: Float[Array, "B S J"],
    w: Float[Array, "B T N"],
    visibility: Visibility,
    k_scale: Float[Array, "B S"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T S"]:
    """``I[t, s] = Σ_n w[t, n] · ReLU(q[t, n] · k[s])`` in float32; -inf where the query may not see the key.

    Constant factors belong in ``w``, which may be negative. Differentiable in ``q``, ``k`` and ``w``; the array is
    quadratic: call it on blocks of queries.

    Both q and k may be float8_e4m3fn: then the scales of the queries, which must be positive, belong in ``w``, those
    of the keys are ``k_scale``, which multiplies the scores of its key, and there is no gradient.

    Raises UnsupportedError for arguments that do not fit, and where e4m3 operands are differentiated.

    Source: V3.2-Exp report eq. 1; checkpoint keys ``indexer.*``.
    """
    available = {"reference": reference.index_scores, "tpu": tpu.index_scores, "gpu": gpu.index_scores}
    chosen = choose("index_scores", implementation, available)
    _check(q, k, w, visibility, k_scale, kernel=chosen is not reference.index_scores)
    if q.dtype != jnp.float8_e4m3fn:
        return chosen(q, k, w, visibility)
    if k_scale is None:
        k_scale = jnp.ones(k.shape[:2], jnp.float32)
    return _forward_only(chosen, q, k, w, visibility, k_scale)


def _check(q, k, w, visibility: Visibility, k_scale, *, kernel: bool) -> None:
    op = "index_scores"
    limits = checks.limits(op, visibility)
    axes = {"q": (q, "B T N J"), "k": (k, "B S J"), "w": (w, "B T N"), **limits}
    scale = {} if k_scale is None else {"k_scale": (k_scale, "B S")}
    checks.shapes(op, axes | scale)
    checks.integers(op, limits)
    if k_scale is not None and q.dtype != jnp.float8_e4m3fn:
        raise UnsupportedError(
            f"{op}: k_scale was given with q in {q.dtype}, and it is for float8_e4m3fn: multiply k by it"
        )
    checks.alike(op, {"q": q, "k": k})
    if q.dtype != jnp.float8_e4m3fn:
        checks.floats(op, {"q": q, "k": k, "w": w}, kernel=kernel)
    if q.dtype != jnp.float64:
        checks.short_floats(op, {"w": w} | {name: array for name, (array, _) in scale.items()})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward_only(chosen, *operands):
    return chosen(*operands)


def _refuse(chosen, q, *_):
    raise UnsupportedError(
        f"index_scores: operands in {q.dtype} have no gradient: train with the same values in bfloat16, or detach them "
        "all with jax.lax.stop_gradient"
    )


_forward_only.defvjp(_refuse, lambda *_: ())
