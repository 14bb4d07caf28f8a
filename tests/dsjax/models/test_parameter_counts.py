"""Parameters of the released models, counted on shapes alone, against the checkpoints.

The main model's count includes the router biases (256 for each of 58 layers) and leaves the MTP module out; the
MTP module's own count leaves out the embedding and head it shares.
"""

import functools
import math

import jax
import pytest
from flax import nnx
from small_model import variables

from dsjax.config import presets
from dsjax.models.transformer import Transformer

CONFIGS = {"v32": presets.deepseek_v32_671b(), "v3": presets.deepseek_v3_671b()}


@functools.cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    model = jax.eval_shape(lambda: Transformer(CONFIGS[name], rngs=nnx.Rngs(0)))
    return {path: variable.shape for path, variable in variables(model)}


def count(name: str, *, where=lambda path: True) -> int:
    return sum(math.prod(shape) for path, shape in shapes(name).items() if where(path))


@pytest.mark.parametrize(("name", "expected"), [("v32", 671_877_944_064), ("v3", 671_026_419_200)])
def test_main_model(name, expected):
    assert count(name, where=lambda path: not path.startswith("mtp.")) == expected


@pytest.mark.parametrize(("name", "expected"), [("v32", 11_624_027_648), ("v3", 11_610_068_224)])
def test_multi_token_prediction(name, expected):
    """11.61B, and in V3.2 an indexer."""
    assert count(name, where=lambda path: path.startswith("mtp.")) == expected


@pytest.mark.parametrize(("name", "layers"), [("v32", 62), ("v3", 0)])
def test_indexer(name, layers):
    assert count(name, where=lambda path: ".indexer." in path) == layers * 13_959_424


def test_active_parameters():
    """36.63B a token: 8 of 256 experts, and the head; the embedding is a single row."""
    main = count("v3", where=lambda path: not path.startswith("mtp.") and path != "embed_tokens")
    routed = count("v3", where=lambda path: path.startswith("moe_layers.mlp.experts."))
    assert (main - routed + routed * 8 // 256) / 1e9 == pytest.approx(36.63, abs=0.005)


def test_elements_of_the_released_checkpoint():
    """MTP's copies of embedding and head included, and a scale for each 128 x 128 block of the F8 weights."""
    copies = count("v32", where=lambda path: path in ("embed_tokens", "lm_head.weight"))
    scales = sum(_scale_blocks(path, shape) for path, shape in shapes("v32").items())
    assert count("v32") + copies + scales == 685_396_921_376


_F8 = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "wq_b", "wk")
_F8 += ("gate_proj", "up_proj", "down_proj")


def _scale_blocks(path: str, shape: tuple[int, ...]) -> int:
    """Scales of a stack of matrices; o_proj contracts two axes, routed experts have one more in front."""
    if not any(name in path.split(".") for name in _F8):
        return 0
    in_front = ("_layers." in path) + (".experts." in path)
    end_of_inputs = in_front + (2 if "o_proj" in path else 1)
    into, out = math.prod(shape[in_front:end_of_inputs]), math.prod(shape[end_of_inputs:])
    return math.prod(shape[:in_front]) * math.ceil(into / 128) * math.ceil(out / 128)
