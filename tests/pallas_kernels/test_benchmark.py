"""The table of the kernels: it needs jax and numpy only, counts as the formulas do, and says what failed."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernels
from kernel_inputs import SIZES, visibility_of
from kernel_operations import FORWARD, Inputs, Operation, Work, seen_pairs, selected_pairs
from kernel_runs import errors_of, relative_error, wrong

from pallas_kernels.platform import UnsupportedError

PROGRAM = Path(kernels.__file__)
# Runs the program where nothing but jax, numpy, what jax needs of them, and the repository's kernels can be found.
ALONE = """
import importlib.machinery as machinery, runpy, sys
allowed = {*sys.stdlib_module_names, "jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "pallas_kernels",
           "device_speed"}

class Alone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if top in allowed or top.startswith(("kernel_", "_")):
            return machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [machinery.BuiltinImporter, machinery.FrozenImporter, Alone]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUICK = ["--sizes=small", "--repeats=2", "--seconds=0.01"]


def alone(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", "-c", ALONE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/")


def test_alone_means_alone(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import flax")
    assert "No module named 'flax'" in alone(str(program)).stderr


@pytest.mark.slow
def test_a_table_with_jax_and_numpy_only(tmp_path):
    written = tmp_path / "kernels.json"
    only = "--only=topk,layer"
    run = alone(str(PROGRAM), *QUICK, only, f"--json={written}")
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(written.read_text())
    assert found["jax"] == jax.__version__
    assert found["device"] in run.stdout
    assert all(0 < flops < math.inf for flops in found["ceilings"]["flops"].values())
    assert 0 < found["ceilings"]["copied_bytes_a_second"] < math.inf
    rows = {f"{row['operation']} {row['case']}": row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 2 + 6 + 3
    for name, row in rows.items():
        assert name in run.stdout
        assert row["failure"] == ""
        assert 0 < row["rate"] < math.inf
        if row["unit"] != "times":
            assert 0 < row["least_milliseconds"] <= row["milliseconds"] < math.inf
            assert row["rounds"] >= 2
            assert 0 < row["of_ceiling"] < math.inf
    sparse, dense = rows["layer sparse at 4096"], rows["layer dense at 4096"]
    speed_up = rows["sparse over dense prefill at 4096"]["rate"]
    assert speed_up == pytest.approx(dense["milliseconds"] / sparse["milliseconds"])


def test_neighbours_share_keys_and_others_do_not():
    sizes, union = dataclasses.replace(SIZES["small"], queries=64), {}
    for operation in kernels.operations(sizes):
        if operation.name == "sparse_mla" and operation.phase == FORWARD:
            union[operation.case] = kernels.notes_of(operation, sizes)["union"]
    assert 1.5 < union["forward, neighbours"] < 3.5 < 10 < union["forward, random"]


def constant(name: str, function) -> Operation:
    """An operation that takes a number."""
    return Operation(
        name,
        FORWARD,
        lambda sizes, _, x, implementation: function(x, implementation),
        lambda sizes, _: [Inputs((), jnp.arange(8.0))],
        shape=lambda sizes: "8",
        work=lambda sizes: Work(flops=8),
    )


def refuse(x, implementation):
    raise UnsupportedError("sums: eight numbers were given, and it takes seven")


def test_a_failure_is_a_row_and_the_others_follow(monkeypatch, capsys, tmp_path):
    fine = constant("topk", lambda x, _: 2 * x)
    monkeypatch.setattr(kernels, "operations", lambda sizes: [constant("indexer", refuse), fine])
    written = tmp_path / "kernels.json"
    assert kernels.main([*QUICK, f"--json={written}"]) == 1
    failed, followed = json.loads(written.read_text())["rows"]
    assert failed["failure"] == "sums: eight numbers were given, and it takes seven"
    assert failed["milliseconds"] is None
    assert followed["milliseconds"] > 0
    out = capsys.readouterr().out
    assert "FAILED: sums: eight numbers were given" in out
    assert kernels.main([*QUICK, "--only=topk"]) == 0


def test_nonsense_is_seen(monkeypatch, capsys):
    """On a device that is not the reference's, whose results differ a little, or much."""

    def off_by(error: float):
        return lambda x, implementation: x if implementation == "reference" else x * (1 + error)

    close, far = constant("topk", off_by(1e-3)), constant("indexer", off_by(0.1))
    monkeypatch.setattr(kernels, "target", lambda: "gpu")
    monkeypatch.setattr(kernels, "operations", lambda sizes: [close])
    assert kernels.main(QUICK) == 0
    monkeypatch.setattr(kernels, "operations", lambda sizes: [close, far])
    assert kernels.main(QUICK) == 1
    assert "outputs off by 1.0e-01" in capsys.readouterr().out


def test_errors():
    a = np.array([3.0, 4.0, -np.inf])
    assert relative_error(a, a) == 0
    assert relative_error(a + np.array([0.5, 0, 0]), a) == pytest.approx(0.1)
    assert math.isnan(relative_error(np.array([3.0, -np.inf, 4.0]), a))
    assert math.isnan(relative_error(np.array([np.nan, 4.0, -np.inf]), a))
    assert wrong({"outputs": math.nan})
    assert wrong({"outputs": 4e-3, "gradients": 9e-3, "selections": 0.0}) == ""
    assert "selections" in wrong({"selections": 1e-9})


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tpu", "gpu"], indirect=True)
def test_kernels_beside_the_reference(implementation):
    """As on a device of theirs, with a cache and a selection in their form."""
    sizes = dataclasses.replace(
        SIZES["small"],
        heads=2,
        index_heads=2,
        queries=32,
        keys=128,
        k=32,
        decoded=128,
        sequences=2,
    )
    (operation,) = (o for o in kernels.operations(sizes) if f"{o.name} {o.case}" == "decode bf16, B = 1")
    errors = errors_of(operation, sizes.piece(), implementation)
    assert errors
    assert not wrong(errors), errors


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["tpu", "gpu"], indirect=True)
def test_kernels_take_the_released_sizes(implementation):
    """Shapes alone, nothing runs: no kernel refuses what the table gives it."""
    sizes = SIZES["671b"]
    for operation in kernels.operations(sizes):

        def whole(operation=operation):
            (primals, others), *_ = operation.inputs(sizes, None)
            return operation.function(sizes, primals, others, None)

        assert jax.tree.leaves(jax.eval_shape(whole)), operation.case


@pytest.mark.parametrize(
    ("queries", "keys", "k"), [(1, 9, 4), (7, 7, 3), (7, 7, 9), (5, 20, 17), (5, 20, 40)]
)
def test_pairs(queries, keys, k):
    mask = np.asarray(visibility_of(queries, keys).mask())
    assert seen_pairs(queries, keys) == mask.sum()
    assert selected_pairs(queries, keys, k) == np.minimum(mask.sum(-1), k).sum()


def test_useful_work_at_the_released_sizes():
    """Per pair, from the widths of the 671B model."""
    sizes = SIZES["671b"]
    work = {f"{o.name} {o.case}": o.work(sizes) for o in kernels.operations(sizes)}
    selected, seen = 1024 * 2048, seen_pairs(1024, 131072)
    assert work["sparse_mla forward, random"].flops == selected * 278_528
    assert work["sparse_mla backward, random"].flops == selected * 2 * 128 * (3 * 576 + 2 * 512)
    assert work["indexer bf16, forward"].flops == seen * 16_384
    assert work["layer dense at 131072"].flops == seen * 81_920
    assert work["decode e4m3, B = 16"].bytes == 16 * (131072 * 132 + 2048 * 656)
