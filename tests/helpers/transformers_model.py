"""The same model in transformers and in dsjax: its configuration, and its parameters by either's names."""

import dataclasses

import numpy as np
import torch
from small_model import variables
from torch.overrides import TorchFunctionMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM

from dsjax.config import ModelConfig
from dsjax.models.transformer import Transformer

# A thread's first call of one of these may run at low accuracy when several threads make theirs at once, one element
# never does (pytorch/pytorch#188792).
for _function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt):
    _function(torch.ones(1))

_OURS_ALONE = {"rope_scaling", "rope_theta", "index_precision", "mtp_input", "compute_dtype", "param_dtype"}
_OURS_ALONE |= {
    "dense_attention_max_length",
    "attention_block_size",
    "remat",
    "scan_layers",
    "expert_exchange",
    "expert_capacity",
}
_OURS_ALONE |= {"num_nextn_predict_layers"}
_INDEXER_ALONE = {"index_n_heads", "index_head_dim", "index_topk"}


def hf_config(config: ModelConfig):
    """The transformers configuration of the same model, attention in eager float32."""
    left_out = _OURS_ALONE if config.has_indexer else _OURS_ALONE | _INDEXER_ALONE
    names = {field.name for field in dataclasses.fields(config)} - left_out
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.uses_yarn:
        rope |= dataclasses.asdict(config.rope_scaling) | {"rope_type": "yarn"}
    kind = DeepseekV32Config if config.has_indexer else DeepseekV3Config
    return kind(
        **{name: getattr(config, name) for name in names},
        rope_parameters=rope,
        num_key_value_heads=config.num_attention_heads,
        attn_implementation="eager",
        pad_token_id=None,
    )


def hf_model(model: Transformer):
    """The model in transformers, float32, with the parameters of ours."""
    config = model.config
    kind = DeepseekV32ForCausalLM if config.has_indexer else DeepseekV3ForCausalLM
    with torch.device("meta"):  # initial values would only be overwritten
        shapes = {name: tuple(value.shape) for name, value in kind(hf_config(config)).state_dict().items()}
    theirs = kind(hf_config(config)).to(torch.float32).eval()
    ours = {path: np.asarray(variable[...]) for path, variable in variables(model)}
    theirs.load_state_dict(
        {name: torch.tensor(value) for name, value in state_dict_from_tree(config, ours, shapes).items()}
    )
    return theirs


def state_dict_from_tree(config: ModelConfig, ours: dict, shapes: dict) -> dict[str, np.ndarray]:
    """The inverse of ``tree_from_state_dict``; both sides must have every element of the other, once.

    Sends the number of every element through the layout, and so learns where each one came from.
    """
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    ends = np.cumsum(sizes)
    numbers = {
        name: np.arange(end - size, end).reshape(shape)
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }
    layout = tree_from_state_dict(config, numbers)
    assert layout.keys() == ours.keys(), layout.keys() ^ ours.keys()
    flat = np.full(ends[-1], np.nan, np.float32)
    for path, places in layout.items():
        assert places.shape == ours[path].shape, (path, places.shape, ours[path].shape)
        flat[places] = ours[path]
    assert not np.isnan(flat).any()
    return {name: flat[places] for name, places in numbers.items()}


def tree_from_state_dict(config: ModelConfig, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``state`` (or gradients by the same names) laid out as ours: path in our tree -> array."""
    tree = {
        "embed_tokens": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"].T,
    }
    dense = config.first_k_dense_replace
    stacks = {"dense_layers": range(dense), "moe_layers": range(dense, config.num_hidden_layers)}
    for stack, numbers in stacks.items():
        layers = [_layer(config, state, f"model.layers.{n}.") for n in numbers]
        for path in layers[0] if layers else ():
            tree[f"{stack}.{path}"] = np.stack([layer[path] for layer in layers])
    return tree


def _layer(config: ModelConfig, state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    heads, hidden = config.num_attention_heads, config.hidden_size
    layer = {}
    for key in (key for key in state if key.startswith(prefix)):
        name, value = key.removeprefix(prefix), state[key]
        if name == "mlp.experts.gate_up_proj":
            gate, up = np.split(value, 2, axis=1)
            layer["mlp.experts.gate_proj"] = gate.swapaxes(1, 2)
            layer["mlp.experts.up_proj"] = up.swapaxes(1, 2)
        elif name == "mlp.experts.down_proj":
            layer[name] = value.swapaxes(1, 2)
        elif name in ("self_attn.q_b_proj.weight", "self_attn.kv_b_proj.weight"):
            layer[name] = value.T.reshape(value.shape[1], heads, -1)
        elif name == "self_attn.indexer.wq_b.weight":
            layer[name] = value.T.reshape(value.shape[1], config.index_n_heads, -1)
        elif name == "self_attn.o_proj.weight":
            layer[name] = value.T.reshape(heads, -1, hidden)
        else:
            layer[name] = value.T if value.ndim == 2 else value
    return layer


class RecordedSelection(TorchFunctionMode):
    """While it is on, ``masks`` collects which keys the indexer of every layer selects, each [B, T, S].

    The indexer returns its best k even where fewer keys are visible, for the attention mask to hide again; here
    they are left out.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.masks: list[np.ndarray] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.topk and args[0].shape[1:] == (self.length, self.length):  # not the router's
            visible = args[0].numpy() > -1e30
            self.masks.append(as_mask(result.indices.numpy(), self.length) & visible)
        return result


def as_mask(indices: np.ndarray, length: int) -> np.ndarray:
    """True at the indices of each row, -1 being none."""
    mask = np.zeros((*indices.shape[:-1], length + 1), bool)
    np.put_along_axis(mask, indices.astype(np.int64), True, axis=-1)
    return mask[..., :length]
