"""Running an operation: on a piece of its input beside the reference, and on all of it for the clock."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_inputs import Sizes, normal
from kernel_operations import BACKWARD, FORWARD, Inputs, Operation

LIMITS = {"outputs": 5e-3, "gradients": 1e-2, "selections": 0.0}


def calls_of(operation: Operation, sizes: Sizes) -> list[Callable[[], Any]]:
    """What is timed, a call for each of the inputs; compiled when first called.

    A backward pass takes what its forward pass kept, which runs here.
    """
    function = partial(operation.function, sizes, implementation=None)
    if operation.phase == BACKWARD:
        forward = jax.jit(partial(_forward, function))
        run = jax.jit(lambda pull_back, d_outputs: pull_back(d_outputs))
        arguments = []
        for inputs in operation.inputs(sizes, None):
            outputs, pull_back = forward(inputs)
            arguments.append((pull_back, _cotangents(outputs)))
    else:
        run = jax.jit(partial(_outputs if operation.phase == FORWARD else _both, function))
        arguments = [(inputs,) for inputs in operation.inputs(sizes, None)]
    return [partial(run, *each) for each in arguments]


def errors_of(operation: Operation, piece: Sizes, implementation: str) -> dict[str, float]:
    """The greatest of each kind in ``LIMITS`` against the reference, whose products are as exact as they can be.

    ``‖x - y‖ / ‖y‖`` of outputs and gradients, of nine queries in ten where an operation selects; the share of a
    selection that differs.
    """
    ours = _results(operation, piece, implementation)
    with jax.default_matmul_precision("highest"):
        theirs = _results(operation, piece, "reference")
    errors = {}
    for kind in theirs:
        for a, b in zip(jax.tree.leaves(ours[kind]), jax.tree.leaves(theirs[kind]), strict=True):
            if jnp.issubdtype(b.dtype, jnp.integer):
                of_array = {"selections": float(jnp.mean(a != b))}
            else:
                of_array = {kind: _error_of_most(a, b) if operation.selects else relative_error(a, b)}
            for name, error in of_array.items():
                errors[name] = float(np.maximum(errors.get(name, 0.0), error))  # NaN stays
    return errors


def wrong(errors: dict[str, float]) -> str:
    """Those above their limits, or not numbers, in words; nothing if there are none."""
    found = [f"{kind} off by {e:.1e}" for kind, e in errors.items() if not e <= LIMITS[kind]]
    return " and ".join(found)


def relative_error(a, b) -> float:
    """``‖a - b‖ / ‖b‖`` in float64 of what is finite in b; NaN where an infinity is not the same."""
    a, b = (np.asarray(jnp.asarray(x, jnp.float32), np.float64) for x in (a, b))
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite]):
        return float("nan")
    a, b = a[finite], b[finite]
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float32).tiny))


def _error_of_most(a, b) -> float:
    """What the errors of nine queries in ten do not exceed, which the first two axes count.

    Scores that round differently may select another key, and then a query's output is another one.
    """
    a, b = (np.asarray(jnp.asarray(x, jnp.float32)).reshape(-1, *x.shape[2:]) for x in (a, b))
    return float(np.quantile([relative_error(x, y) for x, y in zip(a, b, strict=True)], 0.9, method="higher"))


def _results(operation: Operation, piece: Sizes, implementation: str) -> dict[str, Any]:
    function = partial(operation.function, piece, implementation=implementation)
    inputs = operation.inputs(piece, implementation)[0]
    if operation.phase == FORWARD:
        return {"outputs": jax.jit(partial(_outputs, function))(inputs)}
    outputs, gradients = jax.jit(partial(_both, function))(inputs)
    return {"outputs": outputs, "gradients": gradients}


def _outputs(function: Callable, inputs: Inputs):
    return function(inputs.primals, inputs.others)


def _forward(function: Callable, inputs: Inputs):
    return jax.vjp(lambda primals: function(primals, inputs.others), inputs.primals)


def _both(function: Callable, inputs: Inputs):
    outputs, pull_back = _forward(function, inputs)
    return outputs, pull_back(_cotangents(outputs))


def _cotangents(outputs):
    """Normal numbers for the first output, 0 for the log-sum-exp behind it, as in training."""
    first, *others = jax.tree.leaves(outputs)
    d_outputs = [normal(99, first.shape, first.dtype), *map(jnp.zeros_like, others)]
    return jax.tree.unflatten(jax.tree.structure(outputs), d_outputs)
