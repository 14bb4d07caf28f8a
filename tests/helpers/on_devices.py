"""Programs of this folder in a process of their own, on virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parent


def environment(devices: int) -> dict[str, str]:
    """In which a process has so many CPU devices, and finds this folder."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Devices share the cores with other tests: they may wait long for each other.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=900",
        "PYTHONPATH": os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])]),
    }


def on_eight_devices(program: str, *arguments: str) -> Any:
    """The JSON that a program prints in its last line."""
    command = [sys.executable, HELPERS / program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(8), timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])
