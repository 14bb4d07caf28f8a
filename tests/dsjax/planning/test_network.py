"""How long messages take at a network's limit, against numbers worked out by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsjax.planning.chips import CHIPS
from dsjax.planning.hlo import Program
from dsjax.planning.network import Collective, _axes, _group, busy_seconds, collective_of

GB = 1e9
HLO = """HloModule step

ENTRY %main (p: bf16[{rows},7168]) -> bf16[{rows},7168] {{
  %p = bf16[{operand},7168]{{1,0}} parameter(0)
  ROOT %c = bf16[{rows},7168]{{1,0}} {kind}(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}
}}
"""


def torus(*shape: int, per_chip: int = 1) -> np.ndarray:
    """Devices with coordinates, the last number fastest."""
    places = [place for place in np.ndindex(*shape) for _ in range(per_chip)]
    return np.array(
        [SimpleNamespace(id=i, coords=place, slice_index=0) for i, place in enumerate(places)], object
    )


def collective(kind: str, operand: int, rows: int, groups: str, mesh, chip) -> Collective:
    program = Program(HLO.format(kind=kind, operand=operand, rows=rows, groups=groups))
    found = [collective_of(program, run, mesh, chip) for run in program.runs()]
    (only,) = [c for c in found if c]
    return only


def seconds(*arguments) -> float:
    return collective(*arguments).seconds


def mesh_of(devices: np.ndarray, **axes: int) -> Any:
    """In place of a Mesh, which wants devices of jax."""
    return SimpleNamespace(devices=devices.reshape(tuple(axes.values())), axis_names=tuple(axes))


V5P, H100 = CHIPS["v5p"], CHIPS["h100"]


def test_a_ring_has_two_links():
    """7/8 of 1 GB over a closed dimension of eight chips: two links of 100 GB/s."""
    mesh = mesh_of(torus(8, 8, 8), a=8, b=64)
    rows = round(GB / 7168 / 2 / 8) * 8
    ring = "[64,8]<=[8,64]T(1,0)"
    bytes_in = rows * 7168 * 2 * 7 / 8
    assert seconds("all-gather", rows // 8, rows, ring, mesh, V5P) == pytest.approx(bytes_in / 200e9)
    assert seconds("reduce-scatter", rows, rows // 8, ring, mesh, V5P) == pytest.approx(bytes_in / 200e9)
    assert seconds("all-reduce", rows, rows, ring, mesh, V5P) == pytest.approx(2 * bytes_in / 200e9)


def test_a_plane_has_four():
    mesh = mesh_of(torus(8, 8, 8), a=8, b=64)
    rows = 64 * 1000
    bytes_in = rows * 7168 * 2 * 63 / 64
    plane = "[8,64]<=[512]"
    assert seconds("all-gather", rows // 64, rows, plane, mesh, V5P) == pytest.approx(bytes_in / 400e9)
    # Piece by piece: a quarter of the way round eight, so an eighth of 8 · bytes on each of the two links.
    assert seconds("all-to-all", rows, rows, plane, mesh, V5P) == pytest.approx(bytes_in / 100e9)


def test_a_part_of_a_dimension_does_not_close():
    """Four of eight neighbours: one link each way, and half of what is exchanged crosses the middle."""
    mesh = mesh_of(torus(8, 1, 1), a=2, b=4)
    rows = 4000
    bytes_in = rows * 7168 * 2 * 3 / 4
    line = "[2,4]<=[8]"
    assert seconds("all-gather", rows // 4, rows, line, mesh, V5P) == pytest.approx(bytes_in / 100e9)
    assert seconds("all-to-all", rows, rows, line, mesh, V5P) == pytest.approx(bytes_in / 100e9)
    # Opposite ends of the ring: four such groups share its links, each byte takes four of the sixteen.
    far = "[4,2]<=[2,4]T(1,0)"
    assert seconds("all-gather", rows // 2, rows, far, mesh, V5P) == pytest.approx(
        rows * 7168 * 8 * 4 / 16 / 100e9
    )


def test_two_devices_of_a_chip_share_its_links():
    mesh = mesh_of(torus(4, 4, 4, per_chip=2), a=64, b=2)
    rows = 64 * 100
    bytes_in = rows * 7168 * 2 * 63 / 64
    one_of_each = "[2,64]<=[64,2]T(1,0)"
    tpu7x = CHIPS["tpu7x"]
    assert seconds("all-gather", rows // 64, rows, one_of_each, mesh, tpu7x) == pytest.approx(
        2 * bytes_in / 600e9
    )
    # Both of all chips: what is gathered comes to a chip once, what is exchanged for each of its devices.
    everybody = "[1,128]<=[128]"
    rows = 128 * 100
    bytes_in = rows * 7168 * 2 * 127 / 128
    assert seconds("all-gather", 100, rows, everybody, mesh, tpu7x) == pytest.approx(bytes_in / 600e9)
    assert seconds("all-to-all", rows, rows, everybody, mesh, tpu7x) == pytest.approx(
        2 * bytes_in / 2 / 100e9
    )


def test_dimensions_work_side_by_side():
    """An exchange in the planes x, y and a gathering along z are on different links."""
    mesh = mesh_of(torus(4, 4, 8), plane=16, line=8)
    rows = 16 * 1000
    exchange = collective("all-to-all", rows, rows, "[8,16]<=[16,8]T(1,0)", mesh, V5P)
    gathering = collective("all-gather", rows // 8, rows, "[16,8]<=[128]", mesh, V5P)
    bytes_in = rows * 7168 * 2
    busy = {"x": bytes_in * 15 / 16 / 2 / 100e9, "z": bytes_in * 7 / 8 / 200e9}
    assert busy_seconds([exchange, gathering, gathering]) == pytest.approx(
        {"x": busy["x"], "y": busy["x"], "z": 2 * busy["z"]}
    )


def test_slices():
    """A sum over three slices: two thirds come in and go out again, over the device's share of the outer network."""
    devices = np.array([SimpleNamespace(id=i, coords=(i % 4, 0, 0), slice_index=i // 4) for i in range(12)])
    program = Program(
        """HloModule step

ENTRY %main (t: token[]) -> (f32[1000,128], u32[], token[]) {
  %t = token[] after-all()
  ROOT %r = (f32[1000,128]{1,0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, """
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}\n}\n'
    )
    mesh = mesh_of(devices, data=3, fsdp=4)
    (only,) = [c for run in program.runs() if (c := collective_of(program, run, mesh, V5P))]
    assert only.busy == pytest.approx({"between slices": 2 * 1000 * 128 * 4 * 2 / 3 / 6.25e9})
    assert (only.axes, only.devices) == (("data",), 3)


def test_nodes():
    """Of 16 GPUs in two nodes, 8 of 15 parts come from outside: through the cards of all of a node, or through one."""
    devices = np.array([SimpleNamespace(id=i) for i in range(16)], object)
    mesh = mesh_of(devices, a=16)
    rows = 16000
    bytes_in = rows * 7168 * 2 * 15 / 16
    outside = bytes_in * 8 / 15
    everybody = "[1,16]<=[16]"
    assert outside / 8 / 50e9 < bytes_in / 450e9
    assert seconds("all-gather", 1000, rows, everybody, mesh, H100) == pytest.approx(bytes_in / 450e9)
    assert seconds("all-to-all", rows, rows, everybody, mesh, H100) == pytest.approx(outside / 50e9)
    node = "[2,8]<=[16]"
    assert seconds("all-gather", 2000, rows, node, mesh, H100) == pytest.approx(
        rows * 7168 * 2 * 7 / 8 / 450e9
    )


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[2,4]<=[8], x", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [0, 4]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2), x", [0, 1, 4, 5]),
    ],
)
def test_groups(text, group):
    assert _group(text, "all-gather", 8) == group


def test_axes():
    mesh = mesh_of(torus(2, 2, 2), data=2, fsdp=2, expert=2)
    assert _axes([0, 1], mesh) == ("expert",)
    assert _axes([0, 2, 4, 6], mesh) == ("data", "fsdp")
