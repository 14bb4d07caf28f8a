"""The dataclasses of a run, their presets, and how the command line changes them."""

from dsjax.config import presets as presets
from dsjax.config.errors import ConfigError as ConfigError
from dsjax.config.hosts import HostsConfig as HostsConfig
from dsjax.config.mesh import MeshConfig as MeshConfig
from dsjax.config.model import ModelConfig as ModelConfig
from dsjax.config.model import RopeScaling as RopeScaling
from dsjax.config.record import model_from_dict as model_from_dict
from dsjax.config.record import to_dict as to_dict
from dsjax.config.run import CheckpointConfig as CheckpointConfig
from dsjax.config.run import DataConfig as DataConfig
from dsjax.config.run import EvalConfig as EvalConfig
from dsjax.config.run import InitConfig as InitConfig
from dsjax.config.run import LogConfig as LogConfig
from dsjax.config.run import OptimizerConfig as OptimizerConfig
from dsjax.config.run import RunConfig as RunConfig
from dsjax.config.run import TrainConfig as TrainConfig
