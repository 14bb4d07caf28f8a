"""The feed-forward networks that each token chose, weighted and summed."""

import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.expert_mlp import grouped, reference
from pallas_kernels.platform import choose
from pallas_kernels.shapes import Array, Float, Int


def expert_mlp(
    x: Float[Array, "N D"],
    experts: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    gate: Float[Array, "*L E D F"],
    up: Float[Array, "*L E D F"],
    down: Float[Array, "*L E F D"],
    *,
    layer: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """``Σ_k weights[n,k] · (SiLU(x gate[e]) · x up[e]) down[e]`` with ``e = experts[n,k]``, in float32.

    The K experts of a token differ (``platform.debug`` looks); E stands for none. Every pair is computed, none
    dropped, and no more than the pairs: the cost does not grow with the number of experts, nor with how unevenly they
    are loaded. Products in the dtype of ``x`` with float32 accumulation, each rounded once to that dtype on TPU and
    GPU. Differentiable in all but ``experts``.

    With ``layer`` the matrices are those of a stack of layers, and this one's are used: the reference then reads the
    chosen experts alone, where taking the layer out of the stack first would copy them all. For inference; the
    gradient would be as large as the stack.

    Raises UnsupportedError for arguments that do not fit.

    Source: V3 report eq. 12.
    """
    available = {"reference": reference.expert_mlp, "tpu": grouped.expert_mlp, "gpu": grouped.expert_mlp}
    chosen = choose("expert_mlp", implementation, available)
    if isinstance(layer, int):
        layer = jnp.asarray(layer, jnp.int32)
    _check(x, experts, weights, {"gate": gate, "up": up, "down": down}, layer)
    num_experts = gate.shape[-3]
    experts = checks.within("expert_mlp", "experts", experts, 0, num_experts, distinct=True, nobody=True)
    return chosen(x, experts, weights, gate, up, down, layer)


def _check(x: Array, experts: Array, weights: Array, matrices: dict[str, Array], layer: Array | None) -> None:
    op, stack = "expert_mlp", "" if layer is None else "L "
    letters = {"gate": "E D F", "up": "E D F", "down": "E F D"}
    stacked = {name: (matrix, stack + letters[name]) for name, matrix in matrices.items()}
    numbers = {"experts": (experts, "N K")} | ({} if layer is None else {"layer": (layer, "")})
    checks.shapes(op, {"x": (x, "N D")} | numbers | {"weights": (weights, "N K")} | stacked)
    checks.integers(op, numbers)
    checks.short_floats(op, {"x": x, "weights": weights} | matrices)
