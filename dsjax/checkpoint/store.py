"""Saved states of a run, through orbax, asynchronously and whole or not at all."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from dsjax.checkpoint.fp8_arrays import as_stored, scaled
from dsjax.config import ConfigError

Tree = TypeVar("Tree")

_CHUNK_BYTES = 64 << 20


def named_leaves(tree: Any) -> dict[str, Array]:
    """The arrays of a pytree by dotted path, such as ``model.moe_layers.self_attn.o_proj.weight``."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_dotted(path): leaf for path, leaf in paths}


def from_named_leaves(target: Tree, leaves: dict[str, Array]) -> Tree:
    """A pytree like ``target`` with the arrays of ``leaves``. Raises KeyError for a missing one."""
    paths, structure = jax.tree_util.tree_flatten_with_path(target)
    return jax.tree.unflatten(structure, [leaves[_dotted(path)] for path, _ in paths])


def placed(leaves: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arrays that all say where they go; those that did not say go to the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first)
        for name, x in leaves.items()
    }


def _dotted(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    # A variable's array is a child called "value" of the variable.
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def _chunks(key: tuple[Any, ...], value: Any) -> Any:
    """Large arrays are stored in pieces, and stacks so that a layer, or an expert of it, can be read alone."""
    name = _dotted(key)
    lead = ("_layers." in name) + (".mlp.experts." in name)
    if value.nbytes <= _CHUNK_BYTES:
        return None
    matrix = math.prod(value.shape[lead:]) * value.dtype.itemsize
    size = max(_CHUNK_BYTES, matrix) if lead else _CHUNK_BYTES
    return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=size, shard_axes=tuple(range(lead)))


def has_checkpoint(workdir: Path) -> bool:
    """Whether the run in ``workdir`` has saved anything: a finished checkpoint's folder is named by its step."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


class DamagedError(ConfigError):
    """A checkpoint that cannot be read: ``what`` it is, and the way out for the run that wrote it."""

    def __init__(self, what: str, way_out: str):
        super().__init__(f"{what}: {way_out}")
        self.what = what


class CheckpointStore:
    """The checkpoints of a run in ``WORKDIR/checkpoints``.

    Saving returns at once and finishes in the background; a checkpoint that a kill interrupts is not there. Every
    process of a run calls the methods, and writes and reads what lies on its devices: a state may be restored on other
    devices, and by more or fewer processes, than it was saved by.
    """

    def __init__(self, workdir: Path, *, keep: int | None):
        """``keep`` newest ones are kept; None is for reading alone, beside a run that may be saving."""
        self.folder = workdir / "checkpoints"
        keep_latest: Any = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(
            str(self.folder.absolute()),
            preservation_policy=keep_latest,
            cleanup_tmp_directories=keep is not None,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any) -> None:
        """Starts saving; waits first for a save that is still under way."""
        if step == self.latest_step:
            return
        self._orbax.wait()
        checkpointables = {"state": named_leaves(state)}
        context = ocp.Context()
        context.array.saving.scoped_storage_options_creator = _chunks
        with context:
            self._orbax.save_checkpointables_async(step, checkpointables, force=True)

    def restore(self, step: int, target: Tree) -> Tree:
        """The state of ``step``, shaped, typed and placed like the abstract ``target``.

        Raises ConfigError, naming the first array, where the checkpoint holds another model, and where it is damaged.
        """
        wanted = placed(named_leaves(target))
        with self._readable(step):
            self._check_same_arrays(step, wanted)
            loaded = self._orbax.load_checkpointables(step, {"state": wanted})
        return from_named_leaves(target, loaded["state"])

    def restore_part(self, step: int, target: Tree, *, prefix: str) -> Tree:
        """The subtree ``prefix`` of a saved state alone, such as the model without its optimizer; raises as above.

        Matrices that were imported as FP8 with block scales are scaled on their devices.
        """
        wanted = {f"{prefix}.{name}": leaf for name, leaf in placed(named_leaves(target)).items()}
        with self._readable(step):
            self._check_same_arrays(step, wanted, only_these=True)
            saved = self._saved_arrays(step)
            read = wanted | as_stored(saved, wanted)
            everything = {name: read.get(name, ocp.PLACEHOLDER) for name in saved}
            loaded = self._orbax.load_checkpointables(step, {"state": everything})["state"]
            loaded = scaled(loaded, wanted)
        return from_named_leaves(target, {name.removeprefix(f"{prefix}."): loaded[name] for name in wanted})

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turns what orbax raises for missing or cut files, which is of many kinds, into one sentence."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            older = [int(path.name) for path in self.folder.glob("*") if path.name.isdigit()]
            older = [other for other in older if other < step]
            after = f"and the run goes on from step {max(older)}" if older else "and the run starts again"
            what = f"checkpoint {self.folder / str(step)} is damaged ({type(error).__name__})"
            raise DamagedError(what, f"move it away, {after}") from error

    def _saved_arrays(self, step: int) -> dict[str, Any]:
        return self._orbax.checkpointables_metadata(step).metadata["state"]

    def _check_same_arrays(self, step: int, wanted: dict[str, Any], *, only_these: bool = False) -> None:
        saved = self._saved_arrays(step)
        surplus = [] if only_these else sorted(saved.keys() - wanted.keys())
        for name in sorted(wanted.keys() - saved.keys()) + surplus:
            side = "lacks" if name in wanted else "has the extra array"
            raise ConfigError(
                f"checkpoint {self.folder / str(step)} {side} {name}: it is of another model or optimizer; "
                "use the configuration it was trained with, or a new --workdir"
            )
        for name, leaf in wanted.items():
            if tuple(saved[name].shape) != tuple(leaf.shape):
                raise ConfigError(
                    f"checkpoint {self.folder / str(step)} holds {name} with shape {tuple(saved[name].shape)} and "
                    f"the configuration asks for {tuple(leaf.shape)}: use the configuration it was trained with, "
                    "or a new --workdir"
                )

    def wait(self) -> None:
        """Until the save under way is on disk; raises what went wrong with it."""
        self._orbax.wait()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._orbax.close()
