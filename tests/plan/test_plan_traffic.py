"""Bytes that kernels without a matrix product move: texts written by hand, and a program compiled here."""

import jax
import jax.numpy as jnp

from fpo_jax.plan import traffic

# A loop of ten turns over stacked weights: a slice is read, normed, multiplied, and written into a stack.
TEXT = """
%norm (x: bf16[64,32], stack: f32[10,32]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0} parameter(0)
  %stack = f32[10,32]{1,0} parameter(1)
  %i = s32[] constant(3)
  %w = f32[1,32]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,32}
  %flat = f32[32]{0} bitcast(%w)
  ROOT %y = bf16[64,32]{1,0} multiply(%x, %flat)
}

%keep (stack: bf16[10,64,32], x: bf16[64,32]) -> bf16[10,64,32] {
  %stack = bf16[10,64,32]{2,1,0} parameter(0)
  %x = bf16[64,32]{1,0} parameter(1)
  %one = bf16[1,64,32]{2,1,0} bitcast(%x)
  %i = s32[] constant(3)
  ROOT %kept = bf16[10,64,32]{2,1,0} dynamic-update-slice(%stack, %one, %i, %i, %i)
}

%product (x: bf16[64,32], w: bf16[32,32]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,32]{1,0} parameter(1)
  ROOT %d = bf16[64,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (bf16[64,32], f32[10,32], bf16[10,64,32])) -> (bf16[64,32], f32[10,32], bf16[10,64,32]) {
  %p = (bf16[64,32]{1,0}, f32[10,32]{1,0}, bf16[10,64,32]{2,1,0}) parameter(0)
  %x = bf16[64,32]{1,0} get-tuple-element(%p), index=0
  %stack = f32[10,32]{1,0} get-tuple-element(%p), index=1
  %all = bf16[10,64,32]{2,1,0} get-tuple-element(%p), index=2
  %y = bf16[64,32]{1,0} fusion(%x, %stack), kind=kLoop, calls=%norm
  %s = bf16[64,32]{1,0} all-reduce(%y), replica_groups={}, to_apply=%add
  %z = bf16[64,32]{1,0} fusion(%s, %s), kind=kCustom, calls=%product
  %kept = bf16[10,64,32]{2,1,0} fusion(%all, %z), kind=kLoop, calls=%keep
  ROOT %t = (bf16[64,32]{1,0}, f32[10,32]{1,0}, bf16[10,64,32]{2,1,0}) tuple(%z, %stack, %kept)
}

%condition (p: (bf16[64,32], f32[10,32], bf16[10,64,32])) -> pred[] {
  %p = (bf16[64,32]{1,0}, f32[10,32]{1,0}, bf16[10,64,32]{2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p: (bf16[64,32], f32[10,32], bf16[10,64,32])) -> (bf16[64,32], f32[10,32], bf16[10,64,32]) {
  %p = (bf16[64,32]{1,0}, f32[10,32]{1,0}, bf16[10,64,32]{2,1,0}) parameter(0)
  %w = (bf16[64,32]{1,0}, f32[10,32]{1,0}, bf16[10,64,32]{2,1,0}) while(%p), condition=%condition, body=%body, KNOWN
  LAST
}
""".replace("KNOWN", 'backend_config={"known_trip_count":{"n":"10"}}')
ROWS, WEIGHT = 64 * 32 * 2, 32 * 4
IN_THE_LOOP = 10 * (ROWS + WEIGHT + ROWS + 2 * ROWS)  # the norm reads rows and a slice and writes rows; what is kept


def moved(last):
    return traffic.moved(TEXT.replace("LAST", last)) - IN_THE_LOOP


def test_slices_of_stacked_arrays_count_alone_and_products_and_collectives_do_not():
    assert moved("ROOT %t = () tuple()") == 0


def test_kernels_outside_of_fusions_count_what_they_read_and_write():
    assert (
        moved("%q = f32[10,32]{1,0} get-tuple-element(%w), index=1\n  ROOT %c = f32[10,32]{1,0} copy(%q)")
        == 2 * 10 * WEIGHT
    )
    part = "%q = f32[10,32]{1,0} get-tuple-element(%w), index=1\n  ROOT %s = f32[2,32]{1,0} slice(%q), slice={}"
    assert moved(part) == 2 * 2 * WEIGHT
    part = "%q = f32[10,32]{1,0} get-tuple-element(%w), index=1\n  %u = f32[1,32]{1,0} parameter(1)\n"
    part += "  ROOT %s = f32[10,32]{1,0} dynamic-update-slice(%q, %u, %i, %i)"
    assert moved(part) == 2 * WEIGHT


def test_what_stays_on_a_tpu_s_chip_moves_nothing():
    part = "%q = f32[10,32]{1,0} get-tuple-element(%w), index=1\n  ROOT %c = f32[10,32]{1,0:T(8,128)S(1)} copy(%q)"
    assert moved(part) == 10 * WEIGHT  # read alone


def test_a_step_of_gradient_descent_compiled_here_reads_and_writes_each_array_once():
    arrays = [jnp.ones((256, 512))] * 2
    text = jax.jit(lambda weights, gradient: weights - 0.1 * gradient).lower(*arrays).compile().as_text()
    assert traffic.moved(text) == 3 * 4 * 256 * 512
