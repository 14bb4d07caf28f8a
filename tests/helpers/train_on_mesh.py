"""The same run on one device and on meshes of eight: ``python tests/helpers/train_on_mesh.py STEPS MESH ...``

A mesh is written like ``fsdp=2,expert=4``, with ``dense`` for attention that does not select. Prints one JSON object by
mesh: how far losses and parameters differ from those of one device, whether router biases and selections are the same.
"""

import collections
import contextlib
import functools
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numerics import quick_jit
from small_model import variables
from small_run import random_batch, small_run

from dsjax.config import RunConfig
from dsjax.config.mesh import MeshConfig
from dsjax.models.mla import MultiHeadLatentAttention
from dsjax.parallel.mesh import build_mesh, check_fits
from dsjax.parallel.placement import batch_sharding, rows_here, whole_batch
from dsjax.train.losses import objective
from dsjax.train.state import TrainState, initial_state
from dsjax.train.step import build_train_step

BATCH, LENGTH = 8, 64
Selections = dict[tuple[int, int], list[tuple[int, ...]]]


class Ran(NamedTuple):
    """What a run came to, and what each query of each sequence selected in its first step."""

    state: TrainState
    losses: list[float]
    selections: Selections


def config_of(mesh: dict[str, int], dense: bool) -> RunConfig:
    """Half of the sequence selects; every axis divides what lies along it."""
    config = small_run(
        num_attention_heads=8, index_n_heads=8, dense_attention_max_length=LENGTH if dense else 0
    )
    config.train.batch_size, config.train.sequence_length = BATCH, LENGTH
    config.optimizer.warmup_steps = 5
    # Adam divides a gradient by its size: of one that is nothing but rounding, rounding would be made a step.
    config.optimizer.eps = 1e-6
    config.mesh = MeshConfig(**({"fsdp": 1} | mesh))
    return config.freeze()


def batch_at(number: int) -> dict[str, np.ndarray]:
    """Sequences of unequal padding, each a document of its own number."""
    batch = {name: np.asarray(x) for name, x in random_batch(number, batch=BATCH, length=LENGTH).items()}
    real = np.arange(LENGTH) < LENGTH - 5 * np.arange(BATCH)[:, None]
    batch["segment_ids"] = np.where(real, np.arange(1, BATCH + 1, dtype=np.int32)[:, None], 0)
    batch["loss_mask"] = batch["loss_mask"] * real
    return batch


def moved(path: tuple, x: jax.Array) -> jax.Array:
    """Biases away from 0: of one that began there, differences would be those of a few steps of Adam alone."""
    if not jax.tree_util.keystr(path).endswith(".bias.value"):
        return x
    return jax.device_put(np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32), x.sharding)


@contextlib.contextmanager
def selections_noted(into: Selections) -> Any:
    """While programs are made: they say what they select."""
    select = MultiHeadLatentAttention._select

    def note(number: np.ndarray, segment: np.ndarray, selected: np.ndarray) -> None:
        for place in zip(*np.nonzero(segment), strict=True):  # of tokens, not of padding
            into[int(segment[place]), int(number[place])].append(tuple(selected[place].tolist()))

    def noted(self, index, index_key, visibility, *how):
        selected = select(self, index, index_key, visibility, *how)
        jax.debug.callback(note, visibility.query_index, visibility.query_segment, selected)
        return selected

    MultiHeadLatentAttention._select = noted
    yield
    MultiHeadLatentAttention._select = select


def run(config: RunConfig, mesh: Mesh | None, steps: int) -> Ran:
    """So many steps; what the first would select is noted before it, of a forward pass."""
    selections: Selections = collections.defaultdict(list)
    lies = batch_sharding(mesh, BATCH)
    state, losses = initial_state(config, mesh=mesh), []
    state = state._replace(model=jax.tree_util.tree_map_with_path(moved, state.model))

    def whole(number: int) -> Any:
        return whole_batch({n: x[rows_here(lies, BATCH)] for n, x in batch_at(number).items()}, lies, BATCH)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        with selections_noted(selections):
            quick_jit(objective, static_argnums=2)(state.model, whole(0), config.train)
            jax.effects_barrier()
        step = quick_jit(build_train_step(config))
        for number in range(steps):
            state, metrics = step(state, whole(number))
            losses.append(float(metrics["train/total_loss"]))
    return Ran(state, losses, {key: sorted(values) for key, values in selections.items()})


def compared(many: Ran, one: Ran) -> dict[str, Any]:
    """What the test asks."""
    found = {name: np.asarray(value[...]) for name, value in variables(many.state.model)}
    wanted = {name: np.asarray(value[...]) for name, value in variables(one.state.model)}
    biases = [name for name in wanted if "correction_bias" in name]
    differ = {
        name: float(np.linalg.norm(found[name] - x) / np.linalg.norm(x))
        for name, x in wanted.items()
        if name not in biases
    }
    largest = max(jax.tree.leaves(many.state.model), key=lambda x: x.size)
    return {
        "losses": max(abs(a / b - 1) for a, b in zip(many.losses, one.losses, strict=True)),
        "parameters": max(differ.values()),
        "worst": max(differ, key=differ.__getitem__),
        "biases_equal": all(np.array_equal(found[name], wanted[name]) for name in biases),
        "biases_moved": all(np.any(wanted[name]) for name in biases),
        "queries": len(many.selections),
        "selections_equal": many.selections == one.selections,
        "largest_share": largest.addressable_shards[0].data.size / largest.size,
    }


def main() -> None:
    """Compares."""
    steps, found = int(sys.argv[1]), {}
    alone = functools.cache(lambda dense: run(config_of({}, dense), None, steps))
    for text in sys.argv[2:]:
        sizes = [word.split("=") for word in text.split(",") if word != "dense"]
        config = config_of({name: int(size) for name, size in sizes}, "dense" in text)
        check_fits(config, jax.device_count())
        found[text] = compared(run(config, build_mesh(config.mesh), steps), alone("dense" in text))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
