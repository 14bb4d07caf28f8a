"""Atomic addition that waits for nobody: Pallas's own orders each with all other memory, which halves a kernel's speed.

Sums that are read when the kernel has ended need no order. Pallas's Triton backend emits ``acq_rel`` and has no word
for ``relaxed``; here its rule runs with that one word changed. That reaches into jax's internals: where one of them is
missing, Pallas's own addition takes the place (docs/decisions/0009).
"""

import functools
import types
from collections.abc import Callable

import jax


@functools.cache
def relaxed_add() -> Callable[..., object]:
    """``f(ref, index, values)``: ``ref[index] += values`` in memory, atomically and in no order."""
    try:
        return _relaxed_add()
    except (AttributeError, ImportError):
        from jax.experimental.pallas import triton

        return triton.atomic_add


def _relaxed_add() -> Callable[..., object]:
    from jax._src.lib.triton import dialect  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.pallas.triton import lowering, primitives
    from jax._src.state import primitives as state
    from jax.extend.core import Primitive

    # A copy of the rule that sees another ``lowering``: jax's own stays as it is.
    relaxed = functools.partial(lowering._atomic_rmw, semantic=dialect.MemSemantic.RELAXED)
    seen = types.SimpleNamespace(**{**vars(lowering), "_atomic_rmw": relaxed})
    rule = primitives._atomic_lowering_rule
    rule = types.FunctionType(rule.__code__, {**rule.__globals__, "lowering": seen}, rule.__name__)

    addition = Primitive("relaxed_add")
    addition.def_effectful_abstract_eval(primitives._atomic_abstract_eval)
    lowering.register_lowering(addition)(rule)

    def add(ref, index, values):
        ref, transforms = state.get_ref_and_transforms(ref, index, "relaxed_add")
        operands, tree = jax.tree.flatten((ref, transforms, values, None))
        return addition.bind(*operands, args_tree=tree, atomic_type=primitives.AtomicOpType.ADD)

    return add
