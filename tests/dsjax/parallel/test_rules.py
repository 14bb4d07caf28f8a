"""Where arrays lie, and in which order tokens are shared out; of meshes that no machine has to have."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from small_run import small_run

from dsjax.config import ConfigError, presets
from dsjax.config.mesh import MeshConfig
from dsjax.models.transformer import Transformer
from dsjax.parallel.mesh import check_fits
from dsjax.parallel.order import in_order, places, shared_out
from dsjax.parallel.rules import constrain, layout, length_axes, parameter_layout


def mesh_of(**sizes: int):
    axes = {field.name: sizes.get(field.name, 1) for field in dataclasses.fields(MeshConfig)}
    return jax.sharding.use_abstract_mesh(AbstractMesh(tuple(axes.values()), tuple(axes)))


def test_a_mesh_axis_is_used_once_in_an_array_by_what_comes_first():
    with mesh_of(fsdp=4, expert=2, tensor=2):
        assert layout((8, 128, 64), "experts", "embed", "expert_mlp") == PartitionSpec(
            ("expert", "tensor"), "fsdp", None
        )
        assert layout((64, 512), "embed", "vocab") == PartitionSpec("fsdp", ("expert", "tensor"))
        assert layout((16, 64, 32), "batch", "length", None) == PartitionSpec(
            ("fsdp", "expert"), "tensor", None
        )


def test_what_does_not_divide_is_cut_less_and_vectors_not_at_all():
    with mesh_of(fsdp=4, expert=2):
        assert parameter_layout((12, 7), ("embed", "q_lora")) == PartitionSpec("fsdp", None)
        assert parameter_layout((9, 8), ("embed", "q_lora")) == PartitionSpec(None, ("fsdp", "expert"))
        assert parameter_layout((3, 64), ("layers", "embed")) == PartitionSpec()
        assert layout((1, 5), "batch", "length") == PartitionSpec(None, None)


def test_without_a_mesh_nothing_is_shared_out():
    x = np.ones((4, 8))
    assert layout(x.shape, "batch", "length") == PartitionSpec(None, None)
    assert constrain(x, "batch", "length") is x
    np.testing.assert_array_equal(places(8), np.arange(8))


@pytest.mark.parametrize(("context", "tensor"), [(2, 1), (1, 4), (2, 2)])
def test_every_device_has_an_early_and_a_late_piece(context, tensor):
    devices, length = context * tensor, 48
    with mesh_of(context=context, tensor=tensor):
        order = places(length).reshape(devices, 2, -1)
        piece = length // (2 * devices)
        for device, (early, late) in enumerate(order):
            np.testing.assert_array_equal(early, device * piece + np.arange(piece))
            np.testing.assert_array_equal(late, length - (device + 1) * piece + np.arange(piece))
        pairs = order.reshape(devices, -1).sum(axis=1)
        assert np.all(pairs == pairs[0]), "pairs of a query and an earlier key"
        x = np.random.RandomState(0).normal(size=(2, length, 3))
        np.testing.assert_array_equal(in_order(shared_out({"x": x}))["x"], x)
        assert length_axes(2 * devices + 1) == ()


@pytest.mark.parametrize(
    ("mesh", "devices", "said"),
    [
        ({"fsdp": 3}, 8, r"mesh.fsdp=3\) comes to 3 devices, and there are 8"),
        ({"expert": 3}, 8, r"mesh.expert=3.*does not divide the 8 devices"),
        (
            {"tensor": 8},
            8,
            r"model.num_attention_heads=2 is not a multiple of 8, which is tensor.*mesh.tensor=8",
        ),
        (
            {"fsdp": 8},
            8,
            r"train.batch_size / train.accumulation_steps=4 is not a multiple of 8, which is data · fsdp · expert",
        ),
        (
            {"context": 32, "fsdp": 1},
            32,
            r"train.sequence_length=96 is not a multiple of 64, which is 2 · context · tensor",
        ),
        (
            {"context": 3, "fsdp": 1},
            3,
            r"model.hidden_size=\d+ is not a multiple of 3, which is fsdp · expert · context",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_sentence(mesh, devices, said):
    config = small_run()
    config.train.batch_size, config.train.sequence_length = 4, 96
    config.mesh = MeshConfig(**mesh)
    with pytest.raises(ConfigError, match=said):
        check_fits(config.freeze(), devices)


@pytest.mark.parametrize("size", [-1, 0])
def test_an_axis_has_devices(size):
    with pytest.raises(ConfigError, match=rf"mesh.tensor={size} must be at least 1"):
        MeshConfig(tensor=size).check()


def test_every_matrix_of_the_671b_model_is_shared_out():
    """On a pod of 512 no device holds more than 64 MiB of a layer's matrix in float32."""
    config = presets.deepseek_v32_671b().freeze()
    model = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    with mesh_of(fsdp=16, expert=32):
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            spec = parameter_layout(variable.shape, variable.axes)
            names = [name for part in spec for name in (part if isinstance(part, tuple) else (part,)) if name]
            sizes = {"fsdp": 16, "expert": 32}
            held = variable.size * 4 // math.prod(sizes[name] for name in names)
            layers = variable.shape[0] if variable.axes[0] == "layers" else 1
            assert held / layers < 64 << 20, (path, spec)
