"""The feed-forward networks that each token chose, weighted and summed."""

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

    The K experts of a token differ. Every pair is computed, none dropped, and no more than the pairs: the cost does
    not grow with the number of experts, nor with how unevenly they are loaded. Products in the dtype of ``x`` with
    float32 accumulation. Differentiable in all but ``experts``.

    With ``layer`` the matrices are those of a stack of layers, and this one's are used: the reference then reads the
    chosen experts alone, where taking the layer out of the stack first would copy them all. For inference; the
    gradient would be as large as the stack.

    Source: V3 report eq. 12.
    """
    available = {"reference": reference.expert_mlp, "tpu": grouped.expert_mlp, "gpu": grouped.expert_mlp}
    return choose("expert_mlp", implementation, available)(x, experts, weights, gate, up, down, layer)
