"""What a compiled program is said to cost, against XLA's own count, and against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.planning.costs import _convolution_flops, _kernel_flops, cost
from dsjax.planning.hlo import Array, Program, _parsed


def program_of(function, *shapes):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    return Program(compiled.as_text()), compiled


def flops_of(program: Program) -> float:
    return sum(cost(program, run).flops * run.times for run in program.runs())


@pytest.mark.parametrize(
    ("spec", "left", "right"),
    [
        ("ij,jk->ik", (64, 48), (48, 80)),
        ("bhij,bhjk->bhik", (3, 5, 16, 24), (3, 5, 24, 8)),
        ("ij,kj->ki", (9, 7), (5, 7)),
    ],
)
def test_products(spec, left, right):
    program, _ = program_of(lambda a, b: jnp.einsum(spec, a, b), left, right)
    sizes = dict(zip(spec.split("->")[0].replace(",", ""), (*left, *right), strict=True))
    assert flops_of(program) == 2 * np.prod(list(sizes.values()))


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, matrices):
        return jax.lax.scan(lambda x, m: (jnp.tanh(x @ m), None), x, matrices)[0]

    program, _ = program_of(loop, (32, 40), (7, 40, 40))
    assert flops_of(program) == 7 * 2 * 32 * 40 * 40
    assert not program.unknown_loops


def test_a_loop_in_a_loop_and_the_longer_branch():
    def inner(x, m):
        return jax.lax.fori_loop(2, 5, lambda _, y: jnp.tanh(y @ m), x)

    def outer(x, matrices, sign):
        x = jax.lax.scan(lambda x, m: (inner(x, m), None), x, matrices)[0]
        return jax.lax.cond(sign[0] > 0, lambda x: jnp.tanh(x @ x.T) @ x, lambda x: x, x)

    program, _ = program_of(outer, (16, 24), (4, 24, 24), (1,))
    assert flops_of(program) == 4 * 3 * 2 * 16 * 24 * 24 + 2 * 2 * 16 * 16 * 24


def test_a_loop_that_data_ends_is_named_and_counts_once():
    def loop(x, count):
        return jax.lax.fori_loop(0, count[0].astype(jnp.int32), lambda _, y: jnp.tanh(y @ y), x)

    program, _ = program_of(loop, (24, 24), (1,))
    assert flops_of(program) == 2 * 24**3
    assert len(program.unknown_loops) == 1


def test_rounds_after_the_first_count_nothing():
    """As experts have them: the first is outside of the loop. Compared in a fusion of its own, here as on GPUs."""

    def loop(x, count):
        return jax.lax.fori_loop(1, count[0].astype(jnp.int32), lambda _, y: jnp.tanh(y @ y), jnp.tanh(x @ x))

    program, _ = program_of(loop, (24, 24), (1,))
    assert flops_of(program) == 2 * 24**3
    assert len(program.unknown_loops) == 1


def test_a_condition_that_is_true_or_false():
    program = Program(
        """HloModule step

%yes (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%no (y: f32[8,8]) -> f32[8,8] {
  ROOT %y = f32[8,8]{1,0} parameter(0)
}

ENTRY %main (p: pred[], z: f32[8,8]) -> f32[8,8] {
  %p = pred[] parameter(0)
  %z = f32[8,8]{1,0} parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%p, %z, %z), true_computation=%yes, false_computation=%no
}
"""
    )
    assert flops_of(program) == 2 * 8**3


def test_kernels_for_gpus_say_in_their_place_what_they_compute():
    line = (
        '  %k = f32[8]{0} custom-call(%a), custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(step)/flops=1234/grouped_matmul/pallas_call"}'
    )
    assert _kernel_flops(_parsed(line), []) == 1234


def test_as_xla_counts():
    """Of a program without loops, products alone."""

    def loss(x, w, v):
        return jnp.sum(jax.nn.silu(x @ w) @ v)

    program, compiled = program_of(jax.grad(loss, (0, 1, 2)), (128, 256), (256, 512), (512, 64))
    assert flops_of(program) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)


def test_traffic_of_a_slice_is_the_slice():
    """A layer taken from a stack is read alone, and an update of one row does not write the stack."""
    program, _ = program_of(lambda stack, i: stack[i[0].astype(jnp.int32)] * 2, (50, 128, 128), (1,))
    moved = sum(cost(program, run).bytes * run.times for run in program.runs())
    assert 2 * 4 * 128 * 128 <= moved < 4 * 4 * 128 * 128


def test_a_product_of_batches_as_tpus_write_it():
    """A convolution over the batch, whose window meets one input each: [64, 128, 96] by [64, 96, 32]."""
    line = (
        "  %convolution.1 = bf16[64,128,32]{2,1,0} convolution(%a, %b), window={size=64 stride=63 pad=0_0 "
        "lhs_dilate=64}, dim_labels=0bf_0io->0bf"
    )
    left, right = Array("bf16", (64, 128, 96), 0), Array("bf16", (64, 96, 32), 0)
    assert _convolution_flops(_parsed(line), left, right) == 2 * 64 * 128 * 96 * 32


def test_a_line_with_a_layout_and_a_place():
    line = (
        "  ROOT %fusion.7 = (f32[2,1,512]{2,1,0:T(8,128)S(1)}, bf16[4,7168]{1,0:T(8,128)(2,1)}) fusion(%p.1, "
        '/*index=1*/%p.2), kind=kLoop, calls=%fused.3, metadata={op_name="jit(step)/while/dot" stack_frame_id=3}'
    )
    found = _parsed(line)
    assert (found.name, found.opcode, found.operands) == ("fusion.7", "fusion", ("p.1", "p.2"))
    assert found.arrays == (Array("f32", (2, 1, 512), 1), Array("bf16", (4, 7168), 0))
    assert found.arrays[1].size_bytes == 4 * 7168 * 2
    assert found.called("calls") == ["fused.3"]
    assert found.op_name == "jit(step)/while/dot"
    assert found.is_root
