"""How often the loops of compiled programs run: texts written by hand, and programs compiled here."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.plan import execution, hlo, trip_counts

# A loop in a loop. The counter of the inner one is copied, its bound is carried through both.
LOOPS = """
%wrapped_compare (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%wrapped_add (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%a, %two)
}

%inner_body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %i.copy = s32[] copy(%i)
  %next = s32[] fusion(%i.copy), kind=kLoop, calls=%wrapped_add
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %bound = s32[] get-tuple-element(%p), index=2
  ROOT %t = (s32[], f32[8]{0}, s32[]) tuple(%next, %x, %bound)
}

%inner_condition (p: (s32[], f32[8], s32[])) -> pred[] {
  %p = (s32[], f32[8]{0}, s32[]{:T(128)}) parameter(0)
  %bound = s32[] get-tuple-element(%p), index=2
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] fusion(%i, %bound), kind=kLoop, calls=%wrapped_compare
}

%outer_body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %bound = s32[] get-tuple-element(%p), index=2
  %start = s32[] constant(1)
  %t = (s32[], f32[8]{0}, s32[]) tuple(%start, %x, %bound)
  %w = (s32[], f32[8]{0}, s32[]) while(%t), condition=%inner_condition, body=%inner_body
  %y = f32[8]{0} get-tuple-element(%w), index=1
  %same = s32[] get-tuple-element(%w), index=2
  %one = s32[] constant(-1)
  %j.next = s32[] subtract(%j, %one)
  ROOT %r = (s32[], f32[8]{0}, s32[]) tuple(%j.next, %y, %same)
}

%outer_condition (p: (s32[], f32[8], s32[])) -> pred[] {
  %p = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %five = s32[] constant(5)
  ROOT %ge = pred[] compare(%five, %j), direction=GE
}

ENTRY %main (x: f32[8], n: s32[]) -> (s32[], f32[8], s32[]) {
  %x = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %limit = s32[] constant(8)
  %t = (s32[], f32[8]{0}, s32[]) tuple(%zero, %x, %limit)
  ROOT %w = (s32[], f32[8]{0}, s32[]) while(%t), condition=%outer_condition, body=%outer_body
}
"""


def times(text):
    """How often each computation runs."""
    computations, entry = hlo.parse(text)
    names = {id(computation): name for name, computation in computations.items()}
    return {names[id(one.computation)]: one.times for one in execution.run(computations, entry)}


def test_a_bound_that_two_loops_carry_and_a_counter_in_fusions(caplog):
    with caplog.at_level(logging.WARNING, "fpo_jax"):
        found = times(LOOPS)
    assert (found["outer_body"], found["inner_body"]) == (6, 6 * 4)  # 0 to 5; 1, 3, 5, 7 below 8
    assert not caplog.text


# two turns in one, as a loop that is unrolled by two has them
UNROLLED = """%half = s32[] fusion(%i.copy), calls=%wrapped_add
  %next = s32[] fusion(%half)"""
INDEX = """%i = s32[] get-tuple-element(%p), index=0
  ROOT"""
# the condition looks at the counter plus 3
SHIFTED = """%k = s32[] get-tuple-element(%p), index=0
  %c = s32[] constant(3)
  %i = s32[] add(%k, %c)
  ROOT"""


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("constant(8)", "constant(9)", 4),
        ("constant(8)", "constant(10)", 5),
        ("constant(1)", "constant(8)", 0),
        ("direction=LT", "direction=LE", 4),
        ("compare(%a, %b), direction=LT", "compare(%b, %a), direction=GT", 4),
        ("%sum = s32[] add(%a, %two)", "%sum = s32[] add(%two, %a)", 4),
        ("%next = s32[] fusion(%i.copy)", UNROLLED, 2),
        (INDEX, SHIFTED, 2),
        ("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}', 7),
    ],
    ids=str,
)
def test_turns_of_the_inner_loop(old, new, turns):
    assert old in LOOPS
    assert times(LOOPS.replace(old, new))["inner_body"] == 6 * turns


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tuple(%zero, %x, %limit)", "tuple(%zero, %x, %n)"),  # an argument of the program
        ("tuple(%next, %x, %bound)", "tuple(%next, %x, %next)"),  # a bound that moves
        ("tuple(%j.next, %y, %same)", "tuple(%j.next, %y, %j)"),  # another bound in every turn of the outer loop
        ("direction=LT", "direction=EQ"),
        ("constant(2)", "constant(0)"),
    ],
    ids=str,
)
def test_a_loop_of_unknown_length_counts_once_and_says_so(old, new, caplog):
    assert old in LOOPS
    with caplog.at_level(logging.WARNING, "fpo_jax"):
        assert times(LOOPS.replace(old, new))["inner_body"] == 6
    assert "unknown number of times" in caplog.text


def test_a_loop_that_starts_nobody_knows_where_is_counted_from_zero_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "fpo_jax"):
        assert times(LOOPS.replace("tuple(%start, %x, %bound)", "tuple(%j, %x, %bound)"))["inner_body"] == 6 * 4
    assert "starts at an unknown number" in caplog.text


@pytest.mark.parametrize(
    ("compare", "turns"),
    [
        (("LT", 0, 3, 7), 3),
        (("LE", 0, 3, 6), 3),
        (("GT", 7, -3, 0), 3),
        (("GE", 6, -3, 0), 3),
        (("NE", 0, 3, 9), 3),
        (("NE", 9, -3, 0), 3),
        (("NE", 0, 3, 7), None),
        (("NE", 0, 3, -3), None),
        (("LT", 0, -1, 7), None),
        (("LT", 7, -1, 7), 0),
    ],
    ids=str,
)
def test_turns_as_python_counts_them(compare, turns):
    direction, start, step, limit = compare
    assert trip_counts._count(direction, start, step, limit) == turns
    if turns is not None:
        stands = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "NE": int.__ne__}[direction]
        number = 0
        while stands(start, limit):
            start, number = start + step, number + 1
        assert number == turns


def test_micro_batches_over_layers_compiled_here_need_nothing_that_xla_says(caplog):
    """A scan over layers in a scan over micro-batches, forward and backward; without XLA's own counts of the turns."""

    def objective(weights, x):
        layers = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]
        return jnp.sum(layers)

    def step(weights, batches):
        def add(total, x):
            return total + jax.grad(objective)(weights, x), None

        return jax.lax.scan(add, jnp.zeros_like(weights), batches)[0]

    text = jax.jit(step).lower(jnp.ones((5, 16, 16)), jnp.ones((3, 4, 16))).compile().as_text()
    with caplog.at_level(logging.WARNING, "fpo_jax"):
        known, derived = times(text), times(text.replace("known_trip_count", "forgotten"))
    assert "known_trip_count" in text and known == derived and not caplog.text
    assert set(derived.values()) == {1, 3, 15}


def test_a_bound_that_the_program_is_given_compiled_here(caplog):
    def powers(x, turns):
        return jax.lax.fori_loop(0, turns, lambda _, y: y @ y, x)

    text = jax.jit(powers).lower(jnp.ones((8, 8)), np.int32(3)).compile().as_text()
    with caplog.at_level(logging.WARNING, "fpo_jax"):
        assert set(times(text).values()) == {1}
    assert "unknown number of times" in caplog.text
