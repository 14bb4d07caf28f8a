"""A checkpoint's ``config.json`` as our model configuration."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.safetensors_files import read_file
from dsjax.config import ConfigError, ModelConfig
from dsjax.config.model import RopeScaling
from dsjax.precision.block_scales import BLOCK

_FAMILIES = ("deepseek_v32", "deepseek_v3")

_MOST_EXPERTS = 1_000_000  # in all layers; V3.2 has 15,616

# Fields of ours that say how to compute or train, which no checkpoint does; its initializer_range is not what the
# model was trained with.
_HOW = {
    "initializer_range",
    "index_precision",
    "mtp_input",
    "compute_dtype",
    "param_dtype",
    "remat",
    "scan_layers",
    "expert_exchange",
    "expert_capacity",
}
_HOW |= {"dense_attention_max_length", "attention_block_size"}
_ROPE = {"rope_theta", "rope_scaling"}  # spelt otherwise
_INDEXER = {"index_n_heads", "index_head_dim", "index_topk"}

# What the architecture has only one of; absent means the same.
_FIXED = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
# Of YaRN too.
_FIXED_YARN = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
_NEEDED_YARN = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")


class HfConfig(NamedTuple):
    """A checkpoint's ``config.json``."""

    path: Path
    values: dict[str, Any]  # as they stand there
    model: ModelConfig
    is_fp8: bool  # whether its matrices are e4m3 with block scales

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether block scales are powers of two, as V3.2's, or any number, as V3's."""
        return has_power_of_two_scales(self.model, self.values)


def read_config(directory: Path) -> HfConfig:
    """Reads ``config.json``. Raises CheckpointError where it is missing, incomplete or of another architecture."""
    path = directory / "config.json"
    try:
        values = json.loads(read_file(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return _understood(path, values)


def _understood(path: Path, values: dict[str, Any]) -> HfConfig:
    try:
        return HfConfig(path, values, _model(values), _is_fp8(values))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OverflowError:
        raise CheckpointError(f"{path} holds a number that is too large") from None


def _model(values: dict[str, Any]) -> ModelConfig:
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(f"model_type={family!r} is not one of {', '.join(_FAMILIES)}")
    _check_fixed(values, _FIXED | {"rope_interleave": True})
    fields = {field.name for field in dataclasses.fields(ModelConfig)} - _HOW - _ROPE
    if family == "deepseek_v3":
        fields -= _INDEXER
    # transformers' configurations of V3.2 leave it out.
    found = {"num_nextn_predict_layers": 0} | {name: values[name] for name in fields & values.keys()}
    if missing := sorted(fields - found.keys()):
        raise ConfigError(f"{', '.join(missing)} is missing")
    if family == "deepseek_v3":
        found["index_topk"] = 0
    model = ModelConfig(**found, **_rope(values))
    model.check()
    check_countable(model)
    scaling = model.rope_scaling
    if scaling.factor > 1 and not model.uses_yarn:
        raise ConfigError(
            f"max_position_embeddings={model.max_position_embeddings} is not more than the "
            f"{scaling.original_max_position_embeddings} that YaRN extends: leave YaRN out"
        )
    return model


def check_countable(model: ModelConfig) -> None:
    """Raises ConfigError where listing the tensors would take for ever: what is read here comes from strangers."""
    layers, experts = model.num_hidden_layers, model.n_routed_experts
    if layers * experts > _MOST_EXPERTS:
        raise ConfigError(
            f"num_hidden_layers={layers} and n_routed_experts={experts} make more than {_MOST_EXPERTS:,} experts"
        )


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 5 writes together as ``rope_parameters``."""
    section = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    found = _section(values, section)
    method = found.get(
        "rope_type", found.get("type", "default" if not found.keys() - {"rope_theta"} else None)
    )
    theta = found.get("rope_theta", values.get("rope_theta", ModelConfig.rope_theta))
    if method == "yarn":
        scaling = _yarn(found, section)
    elif method == "default":
        scaling = RopeScaling(factor=1.0, original_max_position_embeddings=values["max_position_embeddings"])
    else:
        raise ConfigError(f"{section}.type={method!r} is not one of default, yarn")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _yarn(found: dict[str, Any], section: str) -> RopeScaling:
    if missing := [name for name in _NEEDED_YARN if name not in found]:
        raise ConfigError(f"{section}.{missing[0]} is missing")
    fields = {field.name for field in dataclasses.fields(RopeScaling)}
    if unknown := sorted(found.keys() - fields - _FIXED_YARN.keys() - {"type", "rope_type", "rope_theta"}):
        raise ConfigError(f"{section}.{unknown[0]} is not known here")
    _check_fixed(found, _FIXED_YARN, f"{section}.")
    return RopeScaling(**{name: found[name] for name in fields & found.keys()})


def _check_fixed(values: dict[str, Any], fixed: dict[str, Any], prefix: str = "") -> None:
    for name, only in fixed.items():
        if values.get(name, only) != only:
            raise ConfigError(f"{prefix}{name}={values[name]!r} is not supported: only {only!r}")


def _is_fp8(values: dict[str, Any]) -> bool:
    found = _section(values, "quantization_config")
    if not found:
        return False
    if (found.get("quant_method"), found.get("weight_block_size")) != ("fp8", [BLOCK, BLOCK]):
        raise ConfigError(
            f"quantization_config={found} is not supported: only fp8 in blocks of {BLOCK} by {BLOCK}"
        )
    return True


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within the configuration; empty where it is null or not there."""
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{name}={found!r} must be an object")
    return found


def without_mtp(config: HfConfig) -> HfConfig:
    """The same model without its multi-token-prediction layer."""
    return _understood(config.path, config.values | {"num_nextn_predict_layers": 0})


def with_new_indexer(config: HfConfig, like: ModelConfig | None = None) -> HfConfig:
    """A model without an indexer as the same model with one, of the sizes of ``like`` or else of V3.2.

    Raises CheckpointError for a model that has one.
    """
    if config.model.has_indexer:
        raise CheckpointError(f"{config.path} is of a model that has an indexer: do not ask for a new one")
    if like and not like.has_indexer:
        raise CheckpointError(
            "a new indexer is asked for and model.index_topk=0 is for none: use 2048 for example"
        )
    sizes = {name: getattr(like or ModelConfig(), name) for name in sorted(_INDEXER)}
    sizes["index_topk"] = min(sizes["index_topk"], config.model.max_position_embeddings)
    family = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
    return _understood(config.path, config.values | family | sizes)


def differences(model: ModelConfig, other: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """The fields, with both values, in which the two are not the same function of their weights."""
    free = set(_HOW)
    if not model.has_indexer and not other.has_indexer:
        free |= _INDEXER - {"index_topk"}
    if not model.uses_yarn and not other.uses_yarn:
        free |= {"rope_scaling"}
    for field in dataclasses.fields(model):
        values = getattr(model, field.name), getattr(other, field.name)
        if field.name in free or values[0] == values[1]:
            continue
        if field.name == "rope_scaling":
            for part in dataclasses.fields(RopeScaling):
                one, another = (getattr(value, part.name) for value in values)
                if one != another:
                    yield f"rope_scaling.{part.name}", one, another
        else:
            yield field.name, *values


def config_values(model: ModelConfig, *, is_fp8: bool, dtype: str, base: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of ``model``, over what ``base`` says of things that are not ours."""
    family = "DeepseekV32" if model.has_indexer else "DeepseekV3"
    left_out = _HOW | _ROPE if model.has_indexer else _HOW | _ROPE | _INDEXER
    names = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in left_out]
    values = base | _FIXED | {name: getattr(model, name) for name in names}
    values["architectures"] = [f"{family}ForCausalLM"]
    values["model_type"] = "deepseek_v32" if model.has_indexer else "deepseek_v3"
    values["num_key_value_heads"] = model.num_attention_heads
    values["rope_theta"] = model.rope_theta
    values["rope_scaling"] = (
        {"type": "yarn"} | dataclasses.asdict(model.rope_scaling) if model.uses_yarn else None
    )
    values.pop("rope_parameters", None)
    if not base:
        values |= {"initializer_range": model.initializer_range, "bos_token_id": 0, "eos_token_id": 1}
    for name in ("dtype", "auto_map"):  # the latter is of code beside the weights, which is not kept
        values.pop(name, None)
    values["torch_dtype"] = dtype
    values.pop("quantization_config", None)
    if is_fp8:
        section = quantization_config(model, base)
        values["quantization_config"] = {name: value for name, value in section.items() if value is not None}
    return values


def has_power_of_two_scales(model: ModelConfig, base: dict[str, Any]) -> bool:
    """Whether the scales of ``quantization_config`` are powers of two."""
    return quantization_config(model, base)["scale_fmt"] == "ue8m0"


def quantization_config(model: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
    """How FP8 is stored: as ``base`` says, or else as the release of the family has it.

    ``scale_fmt`` is "ue8m0" where scales are powers of two, None where they are any numbers.
    """
    found = base.get("quantization_config")
    if found:
        return {"scale_fmt": None} | found
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0" if model.has_indexer else None,
        "weight_block_size": [BLOCK, BLOCK],
    }
