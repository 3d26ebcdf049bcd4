"""Operations, collectives and loops are counted in a program's text as often as they happen."""

import jax
import jax.numpy as jnp
import pytest

from modjax.aot import hlo, measure

# As the TPU compiler writes it, cut to what is read: a scan of 8 layers, each gathering its kernel.
SCAN = """HloModule jit_f, is_scheduled=true

%fused.1 (p.1: bf16[256,4096], p.2: bf16[1,4096,4096]) -> bf16[256,4096] {
  %p.1 = bf16[256,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} parameter(1)
  %bitcast.1 = bf16[4096,4096]{1,0} bitcast(%p.2)
  ROOT %c.1 = bf16[256,4096]{1,0:T(8,128)(2,1)} convolution(%p.1, %bitcast.1), dim_labels=bf_io->bf
}

%all-reduce-scatter.2 (p.3: f32[64]) -> f32[4] {
  %p.3 = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%p.3), channel_id=4, replica_groups=[1,16]<=[16], to_apply=%sum
  ROOT %slice.1 = f32[4]{0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={4}
}

%body (w: (s32[], bf16[256,4096], bf16[8,256,4096], s32[])) -> (s32[], bf16[256,4096]) {
  %w = (s32[]{:T(128)}, bf16[256,4096]{1,0:T(8,128)(2,1)S(1)}, bf16[8,256,4096]{2,1,0}, s32[]) parameter(0)
  %x = bf16[256,4096]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%w), index=1
  %k = bf16[1,256,4096]{2,1,0} fusion(%w), kind=kLoop, calls=%slice, backend_config={"estimated_cycles":"100"}
  %g = bf16[1,4096,4096]{2,1,0} all-gather(%k), replica_groups=mesh['a'=16,'b'=1] {'a'}, dimensions={1}
  %y = bf16[256,4096]{1,0} fusion(%x, %g), kind=kOutput, calls=%fused.1, backend_config={"estimated_cycles":"7000"}
  ROOT %t = (s32[], bf16[256,4096]{1,0}) tuple(%i, %y)
}

%condition (w.1: (s32[], bf16[256,4096], bf16[8,256,4096], s32[])) -> pred[] {
  %w.1 = (s32[], bf16[256,4096], bf16[8,256,4096], s32[]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%w.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%w.1), index=3
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

ENTRY %main (a: bf16[256,4096], b: bf16[8,256,4096], c: f32[64]) -> bf16[256,4096] {
  %zero = s32[]{:T(128)} constant(0)
  %eight = s32[]{:T(128)} constant(8)
  %limit = s32[]{:T(128)} copy(%eight)
  %a = bf16[256,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,256,4096]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[64]{0} parameter(2)
  %in = (s32[], bf16[256,4096], bf16[8,256,4096], s32[]) tuple(%zero, %a, %b, %limit)
  %loop = (s32[], bf16[256,4096], bf16[8,256,4096], s32[]) while(%in), condition=%condition, body=%body
  %r = f32[4]{0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.2
  ROOT %out = bf16[256,4096]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_tpus_loop_is_counted_as_often_as_it_runs():
    found = hlo.count(SCAN)
    assert found.flops == 8 * 2 * 256 * 4096 * 4096
    assert found.cycles == 8 * 7100
    shard = 2 * 256 * 4096
    assert found.collectives == {"all-gather": 8 * 15 * shard, "reduce-scatter": 256 * 15 / 16}
    assert found.calls == {"all-gather": 8, "reduce-scatter": 1}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, to_apply=%a", 3),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=4,'b'=8] {'a','b'}", 32),
        ("replica_groups=mesh['a'=4,'b'=8] {'b':(2)4}", 4),
        ("replica_groups=mesh['a'=4,'b'=8], device_ids=([4,8]T(1,0)) {'b'}", 8),
        ("replica_groups={}", 0),
        ("channel_id=1", 0),
    ],
)
def test_the_devices_of_a_collective_are_read_in_every_notation(groups, size):
    assert hlo.group_size(f", {groups}, use_global_device_ids=true") == size


def test_devices_in_an_unknown_notation_are_not_guessed():
    with pytest.raises(ValueError, match="unknown notation: replica_groups=ring<4>"):
        hlo.group_size(", replica_groups=ring<4>, dimensions={0}")


def line(opcode, shape, operand, attributes):
    """A program of one collective."""
    return (
        f"ENTRY %m (p: {operand}) -> {shape} {{\n  %p = {operand} parameter(0)\n"
        f"  ROOT %r = {shape} {opcode}(%p), {attributes}\n}}\n"
    )


@pytest.mark.parametrize(
    ("opcode", "shape", "operand", "received"),
    [
        ("all-gather", "f32[8,4]", "f32[2,4]", 3 * 32),
        ("all-gather-start", "(f32[2,4], f32[8,4])", "f32[2,4]", 3 * 32),
        ("all-reduce", "bf16[8,4]", "bf16[8,4]", 2 * 64 * 3 / 4),
        ("reduce-scatter", "f32[2,4]", "f32[8,4]", 128 * 3 / 4),
        ("all-to-all", "s8[8,4]", "s8[8,4]", 32 * 3 / 4),
        ("collective-permute", "f32[8,4]", "f32[8,4]", 128),
    ],
)
def test_what_a_chip_receives_by_each_collective(opcode, shape, operand, received):
    found = hlo.count(line(opcode, shape, operand, "replica_groups=[2,4]<=[8]"))
    assert found.collectives == {opcode.removesuffix("-start"): received}
    # The end of an asynchronous one is not another one.
    assert not hlo.count(line("all-gather-done", shape, operand, "")).collectives


@pytest.mark.parametrize(
    ("shapes", "attributes", "flops"),
    [
        # x [5, 3] @ w [3, 7]
        (("f32[5,3]", "f32[3,7]", "f32[5,7]"), "dim_labels=bf_io->bf", 2 * 5 * 3 * 7),
        # A batch of 4 products [5, 3] @ [3, 7]: the batch is an axis that meets itself.
        (
            ("f32[4,5,3]", "f32[4,3,7]", "f32[4,5,7]"),
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            2 * 4 * 5 * 3 * 7,
        ),
        (
            ("f32[5,3,9]", "f32[3,7,2]", "f32[5,7,10]"),
            "window={size=2 pad=1_1}, dim_labels=bf0_io0->bf0",
            2 * 5 * 3 * 7 * 18,
        ),
    ],
)
def test_products_that_are_written_as_convolutions(shapes, attributes, flops):
    left, right, out = shapes
    text = (
        f"ENTRY %m (x: {left}, w: {right}) -> {out} {{\n  %x = {left} parameter(0)\n"
        f"  %w = {right} parameter(1)\n  ROOT %r = {out} convolution(%x, %w), {attributes}\n}}\n"
    )
    assert hlo.count(text).flops == flops


def text_of(function, *shapes):
    return jax.jit(function).lower(*(jnp.zeros(s) for s in shapes)).compile().as_text()


def test_nested_loops_multiply():
    def layers(x, kernels):
        def layer(x, kernel):
            def again(_, x):
                return jnp.tanh(x @ kernel)

            return jax.lax.fori_loop(0, 3, again, x), None

        return jax.lax.scan(layer, x, kernels)[0]

    text = text_of(layers, (16, 32), (5, 32, 32))
    assert hlo.count(text).flops == 5 * 3 * 2 * 16 * 32 * 32


def test_a_loop_that_may_stop_early_is_counted_to_its_limit():
    def search(x):
        def goes_on(state):
            return (state[0] < 6) & (jnp.sum(state[1]) > 0)

        def step(state):
            return state[0] + 1, jnp.tanh(state[1] @ state[1])

        return jax.lax.while_loop(goes_on, step, (0, x))[1]

    assert hlo.count(text_of(search, (16, 16))).flops == 6 * 2 * 16**3

    def unbounded(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: jnp.tanh(x @ x), x)

    assert hlo.count(text_of(unbounded, (16, 16)), unknown_trips=9).flops == 9 * 2 * 16**3


def test_the_compilers_complaint_about_memory_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    )
    assert hlo.fits_error(message) == [20.5 * 2**30, 15.75 * 2**30]
    assert hlo.fits_error("INVALID_ARGUMENT: no") is None


def test_operations_without_a_price_do_not_make_time_negative():
    assert measure.priced(0.25) == 0.25
    assert measure.priced(-2.75) == pytest.approx(0.25)


def test_a_loop_that_the_compiler_unrolled_runs_half_as_often():
    # Its counter, the carried limit's neighbour, goes up by one twice.
    text = SCAN.replace(
        "  ROOT %t = (s32[], bf16[256,4096]{1,0}) tuple(%i, %y)",
        "  %one = s32[] constant(1)\n"
        "  %i = s32[] get-tuple-element(%w), index=0\n"
        "  %i.2 = s32[] add(%i, %one)\n"
        "  %i.3 = s32[] add(%i.2, %one)\n"
        "  ROOT %t = (s32[], bf16[256,4096]{1,0}) tuple(%i.3, %y)",
    )
    assert hlo.count(text).cycles == 4 * 7100
    # From 2 instead of 0, three times.
    assert hlo.count(text.replace("constant(0)", "constant(2)")).cycles == 3 * 7100


def test_an_asynchronous_collective_counts_once_though_fusions_on_the_way_repeat_it():
    def part(name, call):
        return (
            f"%{name} (p: f32[2,4]) -> f32[8,4] {{\n  %p = f32[2,4] parameter(0)\n"
            f"  %g = f32[8,4] all-gather(%p), channel_id=3, replica_groups=[1,4]<=[4], dimensions={{0}}, "
            f'metadata={{op_name="jit(step)/layers/query/flix/gather"}}\n'
            f"  ROOT %c = f32[8,4] custom-call(%g){call}\n}}\n\n"
        )

    start, step, end = "fused.1", "async_collective_fusion.2", "fused.3"
    text = (
        part(start, ', custom_call_target="AsyncCollectiveStart"')
        + part(step, ', custom_call_target="AsyncCollectiveStep"')
        + part(end, ', custom_call_target="AsyncCollectiveDone"')
        + "ENTRY %m (x: f32[2,4]) -> f32[8,4] {\n  %x = f32[2,4] parameter(0)\n"
        + "".join(
            f"  %f{i} = f32[8,4] fusion(%x), kind=kCustom, calls=%{name}\n"
            for i, name in enumerate((start, step, end))
        )
        + "}\n"
    )
    found = hlo.count(text, mark="/(lora|flix)/")
    assert found.calls == {"all-gather": 1}
    assert found.marked == found.collectives["all-gather"] == 3 * 32
    assert hlo.count(text, mark="/poly/").marked == 0
