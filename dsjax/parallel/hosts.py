"""The processes of a run, one a host, on JAX's multi-controller runtime.

Where the scheduler says what a process needs to know (Cloud TPU, GKE, Slurm, Open MPI), JAX finds it. Elsewhere each
process is given JAX_COORDINATOR_ADDRESS, the host and port of process 0, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from dsjax.config import ConfigError, HostsConfig, RunConfig, to_dict
from dsjax.config.record import differences

T = TypeVar("T")

_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination", "closed by peer")
_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_SOON_SECONDS = 15.0  # after which a process that waits says so


@contextlib.contextmanager
def together(config: RunConfig) -> Iterator[None]:
    """Joins the processes of the run, if there are several; whatever ends one of them ends it at once.

    Its peers learn that it is gone from its silence: waiting for them, to end in order, would keep them waiting.

    Raises ConfigError where the variables do not go together, or the processes were given different values.
    """
    _join(config.hosts)
    if jax.process_count() > 1:
        print(introduction(), flush=True)
    try:
        _refuse_other_values(config)
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


def first_alone(make: Callable[[], T], what: str) -> T:
    """``make()``, of the first process before all others, which find what it has written."""
    if not is_first():
        wait_for_all(what)
        return make()
    made = make()
    wait_for_all(what)
    return made


def from_first(content: bytes) -> bytes:
    """What the first process gives, to all."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    own = np.frombuffer(content, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own), np.uint8).tobytes()


def wait_for_all(what: str) -> None:
    """Returns when every process has come to this point; however long the slowest may take for it."""
    if jax.process_count() > 1:
        multihost.sync_global_processes(f"dsjax: {what}", timeout=7 * 24 * 3600)


def _join(config: HostsConfig) -> None:
    if jax.distributed.is_initialized():
        return
    given = _from_environment()
    if given.get(_INDEX) == 0:
        _refuse_taken_port(os.environ[_ADDRESS])
    with _watch(config.start_timeout_seconds):
        try:
            jax.distributed.initialize(
                num_processes=given.get(_COUNT),
                process_id=given.get(_INDEX),
                # Past our own, which says what to look at; this one ends the process.
                initialization_timeout=config.start_timeout_seconds + 30,
                heartbeat_timeout_seconds=config.silence_timeout_seconds,
                shutdown_timeout_seconds=config.silence_timeout_seconds,
            )
        except ValueError:  # nothing says that there are several
            if given:
                raise
            if _ADDRESS in os.environ:
                raise _half_set() from None
        except RuntimeError as error:  # a notebook that has used JAX before
            if given or "before any JAX calls" not in " ".join(str(error).split()):
                raise


def _refuse_taken_port(address: str) -> None:
    """Process 0 is to listen there; JAX, which finds it taken, ends in a traceback or without a word."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as soon as an earlier run has ended
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"{_ADDRESS}={address}: process 0 cannot listen on this port ({error}): use a free one"
            ) from None


def _refuse_other_values(config: RunConfig) -> None:
    """Raises ConfigError where the first process was given another value; what is written where may differ."""
    first = json.loads(from_first(json.dumps(to_dict(config)).encode()))
    for name, its, own in differences(first, to_dict(config)):
        if not name.startswith("log."):
            raise ConfigError(
                f"{name}={own} in process {jax.process_index()} and {its} in process 0: start all with the same flags"
            )


def _from_environment() -> dict[str, int]:
    names, address = (_COUNT, _INDEX), os.environ.get(_ADDRESS)
    if address and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"{_ADDRESS}={address} is not HOST:PORT of process 0, such as 10.0.0.1:8476")
    found = {}
    for name in names:
        text = os.environ.get(name)
        if text is None:
            continue
        if not re.fullmatch(r"\d+", text):
            raise ConfigError(f"{name}={text} in the environment is not a number: set it for each process")
        found[name] = int(text)
    if found and not (address and len(found) == 2):
        raise _half_set()
    if len(found) == 2 and not found[_INDEX] < found[_COUNT]:
        raise ConfigError(
            f"{_INDEX}={found[_INDEX]} must be less than {_COUNT}={found[_COUNT]}: processes count from 0"
        )
    return found


def _half_set() -> ConfigError:
    names = (_ADDRESS, _COUNT, _INDEX)
    given, lacking = ([name for name in names if (name in os.environ) == wanted] for wanted in (True, False))
    return ConfigError(
        f"set: {', '.join(given)}; not set: {', '.join(lacking)}: a run of several processes needs all three, and a "
        "run of one none"
    )


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
    index, count = os.environ.get(_INDEX), os.environ.get(_COUNT)
    return f"process {index} of {count}" if index and count else "this process"


def _awaited() -> str:
    address = os.environ.get(_ADDRESS, "the address that the scheduler gave")
    if os.environ.get(_INDEX) == "0":
        return f"the others to come to {address}"
    return f"process 0 at {address} and all others"


def _waited_in_vain(seconds: int) -> str:
    host, _, port = os.environ.get(_ADDRESS, "HOST:PORT").rpartition(":")
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
            f"{name} lost another one ({first}): the log of the one that ended first says why; unless that is to be "
            "mended first, the same command on all hosts goes on from the newest checkpoint"
        )
    traceback.print_exception(error)
    return f"{name} ended with {type(error).__name__}: {first}"


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
