"""States come back as they were saved, and never as another model's."""

import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from dsjax.checkpoint.store import CheckpointStore, from_named_leaves, named_leaves
from dsjax.config import ConfigError


class State(NamedTuple):
    model: dict
    optimizer: tuple
    step: jax.Array


def state(value: float, width: int = 1000) -> State:
    return State(
        {"w": jnp.full((300, width), value), "b": jnp.arange(3, dtype=jnp.bfloat16)}, (), jnp.int32(7)
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_names_are_dotted_paths_and_lead_back():
    tree = state(1.0)
    leaves = named_leaves(tree)
    assert sorted(leaves) == ["model.b", "model.w", "step"]
    jax.tree.map(np.testing.assert_array_equal, from_named_leaves(abstract(tree), leaves), tree)


def test_the_newest_states_come_back(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, state(float(step)))
    store.close()

    again = CheckpointStore(tmp_path, keep=2)
    assert again.latest_step == 5
    restored = again.restore(5, abstract(state(0.0)))
    jax.tree.map(np.testing.assert_array_equal, restored, state(5.0))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    again.close()


def test_a_state_that_is_donated_while_it_is_being_saved_is_saved_as_it_was(tmp_path):
    store, current = CheckpointStore(tmp_path, keep=9), state(0.0, width=20_000)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    for step in range(1, 5):
        current = advance(current)
        store.save(step, current)
        for _ in range(3):
            current = advance(current)
    store.close()
    again = CheckpointStore(tmp_path, keep=9)
    for step in range(1, 5):
        restored = again.restore(step, abstract(current))
        np.testing.assert_array_equal(restored.model["w"], np.full((300, 20_000), 4 * step - 3))
    again.close()


def test_a_part_can_be_read_alone(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, state(2.0))
    store.wait()
    part = store.restore_part(3, abstract(state(0.0).model), prefix="model")
    jax.tree.map(np.testing.assert_array_equal, part, state(2.0).model)
    store.close()


def test_another_model_is_refused_by_the_name_of_the_array(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, state(2.0))
    store.wait()
    with pytest.raises(ConfigError, match=r"model\.w with shape \(300, 1000\).*asks for \(300, 999\)"):
        store.restore(3, abstract(state(0.0, width=999)))
    more = state(0.0)._replace(optimizer=(jnp.zeros(2),))
    with pytest.raises(ConfigError, match=r"lacks optimizer\.0"):
        store.restore(3, abstract(more))
    fewer = state(0.0)._replace(model={"w": jnp.zeros((300, 1000))})
    with pytest.raises(ConfigError, match=r"has the extra array model\.b"):
        store.restore(3, abstract(fewer))
    store.close()


def test_reading_leaves_a_save_under_way_alone(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(3, state(2.0))
    store.close()
    under_way = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    under_way.mkdir()
    reader = CheckpointStore(tmp_path, keep=None)
    assert reader.latest_step == 3
    reader.restore_part(3, abstract(state(0.0).model), prefix="model")
    reader.close()
    assert under_way.is_dir()
    writer = CheckpointStore(tmp_path, keep=2)
    writer.save(5, state(1.0))
    writer.close()
    assert not under_way.exists(), "the next training run clears what a kill left"


@pytest.mark.parametrize("damage", ["state gone", "empty", "cut short"])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (3, 4):
        store.save(step, state(2.0))
    store.close()
    folder = tmp_path / "checkpoints" / "4"
    if damage == "cut short":
        for path in (path for path in (folder / "state").rglob("*") if path.is_file()):
            path.write_bytes(path.read_bytes()[:20])
    else:
        shutil.rmtree(folder / "state" if damage == "state gone" else folder)
        folder.mkdir(exist_ok=True)
    again = CheckpointStore(tmp_path, keep=2)
    with pytest.raises(ConfigError, match=r"checkpoints/4 is damaged .*the run goes on from step 3"):
        again.restore(4, abstract(state(0.0)))
    again.close()


def test_a_large_stack_is_stored_by_layers_and_experts(tmp_path):
    shapes = {
        "moe_layers": {"mlp": {"experts": {"up_proj": (3, 4, 1024, 2048)}, "gate": (3, 1024, 4)}},
        "head": (4096, 6000),
    }
    tree = jax.tree.map(lambda shape: jnp.zeros(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"model": tree})
    store.close()
    names = ("moe_layers.mlp.experts.up_proj", "moe_layers.mlp.gate", "head")
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/checkpoints/1/state/"}
    specs = [{"driver": "zarr3", "kvstore": base | {"path": f"model.{name}/"}} for name in names]
    found = [tuple(tensorstore.open(spec).result().chunk_layout.read_chunk.shape) for spec in specs]
    assert found == [(1, 1, 1024, 2048), (3, 1024, 4), (4096, 3000)]
