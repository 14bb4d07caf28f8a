"""The table of names against the published totals, and against every array of our own tree."""

import collections
import itertools
import math

import pytest
from flax import nnx

from dsjax.checkpoint.hf_names import CheckpointTensor, checkpoint_tensors
from dsjax.config import ModelConfig, presets
from dsjax.models.transformer import Transformer

_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def totals(config: ModelConfig) -> tuple[int, int, int]:
    """Tensors, elements and bytes."""
    tensors = list(checkpoint_tensors(config))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    elements = [math.prod(tensor.shape) for tensor in tensors]
    sizes = [count * _BYTES[tensor.dtype] for count, tensor in zip(elements, tensors, strict=True)]
    return len(tensors), sum(elements), sum(sizes)


def test_totals_are_those_of_the_released_v32():
    assert totals(presets.deepseek_v32_671b()) == (92_425, 685_396_921_376, 689_471_107_200)


def test_v3_has_seven_tensors_less_in_each_of_its_62_layers():
    assert totals(presets.deepseek_v3_671b())[0] == 92_425 - 7 * 62


def test_a_partial_block_of_a_matrix_has_a_scale_of_its_own():
    tensors = {tensor.name: tensor for tensor in checkpoint_tensors(presets.deepseek_v32_671b())}
    name = "model.layers.61.self_attn.kv_a_proj_with_mqa.weight"  # MTP's, 576 rows
    assert (tensors[name].shape, tensors[name].dtype) == ((576, 7168), "F8_E4M3")
    assert tensors[name + "_scale_inv"].shape == (5, 56)


@pytest.mark.parametrize("preset", [presets.deepseek_v32_671b, presets.deepseek_v3_671b, presets.v32_small])
def test_every_array_of_our_tree_is_filled_once(preset):
    config = preset().freeze()
    arrays = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))))
    shapes = {".".join(map(str, path)): variable.shape for path, variable in arrays}
    parts: dict[str, list[CheckpointTensor]] = collections.defaultdict(list)
    for tensor in checkpoint_tensors(config):
        if not tensor.scale_of and not tensor.copy_of:
            parts[tensor.path].append(tensor)
    assert parts.keys() == shapes.keys()
    for path, tensors in parts.items():
        (ours,) = {tensor.ours for tensor in tensors}
        stacked = shapes[path][: len(shapes[path]) - len(ours)]
        assert shapes[path] == (*stacked, *ours)
        places = itertools.product(*map(range, stacked))
        assert sorted(tensor.place for tensor in tensors) == list(places)
        assert all(math.prod(tensor.shape) == math.prod(ours) for tensor in tensors)
