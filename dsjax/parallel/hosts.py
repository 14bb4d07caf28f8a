"""The processes of a run, one a host, on JAX's multi-controller runtime.

Where the scheduler says what a process needs to know (Cloud TPU, GKE, Slurm, Open MPI), JAX finds it. Elsewhere each
process is given JAX_COORDINATOR_ADDRESS, the host and port of process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
from orbax.checkpoint import multihost

from dsjax.config import ConfigError
from dsjax.config.hosts import HostsConfig

_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination", "closed by peer")
_SOON_SECONDS = 15.0  # after which a process that waits says so


@contextlib.contextmanager
def together(config: HostsConfig) -> Iterator[None]:
    """Joins the processes of the run, if there are several; whatever ends one of them ends it at once.

    Its peers learn that it is gone from its silence: waiting for them, to end in order, would keep them waiting.

    Raises ConfigError where the variables do not go together.
    """
    _join(config)
    if jax.process_count() > 1:
        print(introduction(), flush=True)
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else 2 if isinstance(error, ConfigError) else 1
        if not isinstance(error, SystemExit):
            _complain(_what_ended(error))
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    wait_for_all("the end")


def introduction() -> str:
    """Which process this is and what it has: ``process 1 of 4: 8 of 32 devices, TPU v5``."""
    here, all_devices = jax.local_devices(), jax.device_count()
    return (
        f"process {jax.process_index()} of {jax.process_count()}: {len(here)} of {all_devices} devices, "
        f"{here[0].device_kind}"
    )


def is_first() -> bool:
    """Whether this is the process that writes files that are not each process's own, and speaks."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints ``text``, once for all processes."""
    if is_first():
        print(text)


def wait_for_all(what: str) -> None:
    """Returns when every process has come to this point; however long the slowest may take for it."""
    if jax.process_count() > 1:
        multihost.sync_global_processes(f"dsjax: {what}", timeout=7 * 24 * 3600)


def _join(config: HostsConfig) -> None:
    if jax.distributed.is_initialized():
        return
    given = _from_environment()
    with _watch(config.start_timeout_seconds):
        try:
            jax.distributed.initialize(
                num_processes=given.get("JAX_NUM_PROCESSES"),
                process_id=given.get("JAX_PROCESS_ID"),
                # Past our own, which says what to look at; this one ends the process.
                initialization_timeout=config.start_timeout_seconds + 30,
                heartbeat_timeout_seconds=config.silence_timeout_seconds,
                shutdown_timeout_seconds=config.silence_timeout_seconds,
            )
        except ValueError:  # nothing says that there are several
            if given:
                raise
        except RuntimeError as error:  # a notebook that has used JAX before
            if given or "before any JAX calls" not in " ".join(str(error).split()):
                raise


def _from_environment() -> dict[str, int]:
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = {}
    for name in names:
        text = os.environ.get(name)
        if text is None:
            continue
        if not re.fullmatch(r"\d+", text):
            raise ConfigError(f"{name}={text} in the environment is not a number: set it for each process")
        found[name] = int(text)
    if found and not (address and len(found) == 2):
        given = [name for name in ("JAX_COORDINATOR_ADDRESS", *names) if name in os.environ]
        lacking = [name for name in ("JAX_COORDINATOR_ADDRESS", *names) if name not in os.environ]
        raise ConfigError(
            f"{' and '.join(given)} is set and {' and '.join(lacking)} is not: a run of several processes needs all "
            "three, and a run of one none"
        )
    if len(found) == 2 and not found["JAX_PROCESS_ID"] < found["JAX_NUM_PROCESSES"]:
        raise ConfigError(
            f"JAX_PROCESS_ID={found['JAX_PROCESS_ID']} must be less than JAX_NUM_PROCESSES="
            f"{found['JAX_NUM_PROCESSES']}: processes count from 0"
        )
    return found


@contextlib.contextmanager
def _watch(seconds: int) -> Iterator[None]:
    """Says for whom this process waits, and in the end that it waited in vain."""

    def end() -> None:
        _complain(_waited_in_vain(seconds))
        os._exit(1)

    def tell() -> None:
        _complain(f"{_own_name()} waits for {_awaited()}, at most {seconds} s")

    timers = [threading.Timer(seconds, end), threading.Timer(min(_SOON_SECONDS, seconds / 2), tell)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _own_name() -> str:
    index, count = (os.environ.get(name) for name in ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"))
    return f"process {index} of {count}" if index and count else "this process"


def _awaited() -> str:
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "the address that the scheduler gave")
    if os.environ.get("JAX_PROCESS_ID") == "0":
        return f"the others to come to {address}"
    return f"process 0 at {address} and all others"


def _waited_in_vain(seconds: int) -> str:
    host, _, port = os.environ.get("JAX_COORDINATOR_ADDRESS", "HOST:PORT").rpartition(":")
    return (
        f"{_own_name()} waited {seconds} s for {_awaited()}, in vain: look in the others' logs whether they started, "
        f"and whether their hosts reach this address (nc -vz {host} {port}); hosts.start_timeout_seconds is how long "
        "to wait"
    )


def _what_ended(error: BaseException) -> str:
    name = f"process {jax.process_index()} of {jax.process_count()}"
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if isinstance(error, ConfigError):
        return first
    if any(sign in str(error) for sign in _LOST):
        return (
            f"{name} lost another one ({first}): the log of the one that ended first says why; the same command on all "
            "hosts goes on from the newest checkpoint"
        )
    traceback.print_exception(error)
    return f"{name} ended with {type(error).__name__}: {first}"


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
