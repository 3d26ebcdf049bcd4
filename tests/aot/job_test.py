"""A gin job becomes programs by its shapes alone, and mistakes are told before anything is compiled."""

import importlib.util
import json
import re
import sys

import jax
import numpy as np
import pytest

from modjax import hub, launch, quantization
from modjax.aot import __main__ as aot
from modjax.aot import chips, job, measure
from modjax.networks import t5

TINY = ("--gin_file=tests/testdata/tiny.gin", "--gin_file=runs/finetune.gin")
SIZES = (
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
    "--gin.BATCH_SIZE=4",
)
ASKED = ("--features=task=2,language=3", "--segments=0")


def tiny(method, *more):
    """The job of a method on a tiny T5."""
    flags = launch.parse_flags((*TINY, f"--gin_file=methods/{method}.gin", *SIZES, *more), "")
    return job.from_gin(flags, {"task": 2, "language": 3}, 0)


def test_a_base_in_its_precision_and_the_adapters_are_counted_without_a_weight():
    held = {}
    for dtype in ("float32", "bfloat16", "int8"):
        made = tiny("flix", f"--gin.train.train.base_dtype='{dtype}'")
        held[dtype] = job.training(made, jax.devices()[:1]).held
    assert held["float32"]["base"] == 2 * held["bfloat16"]["base"]
    assert 0.25 < held["int8"]["base"] / held["float32"]["base"] < 0.5
    # 5 values of rank 4 at each layer: q, k, v and out are 16 to 16, thrice; three of feed-forward in each stack.
    sites = 3 * 4 * (16 + 16) + 2 * 3 * (16 + 32)
    assert held["int8"]["trained"] == 4 * 5 * 4 * sites
    assert held["int8"]["optimizer"] == pytest.approx(2 * held["int8"]["trained"], rel=1e-3)


def test_a_base_in_a_folder_is_counted_in_the_precision_of_its_files(tmp_path):
    config = t5.T5Config(260, 16, 2, 8, 32, 1, 1)
    tokens = np.ones((1, 4), int)
    params = t5.Transformer(config).init(jax.random.key(0), tokens, tokens)["params"]
    hub.save_base(tmp_path, config, jax.tree.map(lambda x: x.astype("bfloat16"), params))
    held = [
        job.training(tiny("lora", *flags), jax.devices()[:1]).held["base"]
        for flags in ((), (f"--gin.BASE='{tmp_path}'",))
    ]
    assert held[0] == 2 * held[1]


def test_the_shapes_of_an_int8_base_are_those_of_its_values():
    rng = np.random.default_rng(0)
    tree = {"layer": {"kernel": rng.normal(size=(3, 12, 5)), "scale": np.ones(5)}}
    tree["embedding"] = rng.normal(size=(6, 9))
    tree = jax.tree.map(np.float32, tree)
    shapes = quantization.shapes(jax.eval_shape(lambda: tree))
    described = [
        jax.tree.map(lambda x: (tuple(x.shape), np.dtype(x.dtype)), one)
        for one in (shapes, quantization.quantize(tree))
    ]
    assert described[0] == described[1]


def test_full_training_needs_three_times_the_products_of_the_forward_pass():
    made = tiny("full")
    useful = job.model_flops(made)
    # By hand: positions times kernels; the decoder's cross-attention reads the encoder's; products of attention.
    kernel, rows, inputs, targets = 16 * 16, 4, 8, 4
    mlp, logits = 3 * 16 * 32, 16 * 260
    weights = rows * (
        inputs * (4 * kernel + mlp)
        + targets * (4 * kernel + 2 * kernel + mlp + logits)
        + inputs * 2 * kernel
    )
    attention = rows * 2 * 16 * (inputs**2 + targets**2 + inputs * targets)
    assert useful == 3 * 2 * (weights + attention)
    assert job.model_flops(tiny("lora")) == 2 * 2 * weights + 3 * 2 * attention
    # And the compiled step does just that, but for the gradient of the encoder's input.
    cost = measure.compile_for(job.training(made, jax.devices()[:1]), "cpu")
    assert 0.95 < cost.flops / useful <= 1.01


def test_the_command_tells_what_a_job_takes(capsys):
    argv = ["--topology=cpu", "--json", *ASKED, *TINY, "--gin_file=methods/lora.gin", *SIZES]
    assert aot.main(argv) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("cpu, {'data': 1, 'fsdp': 1, 'model': 1}")
    assert lines[1] == "training step: 4 rows, 48 positions; on each chip:"
    assert "decoding, 4 steps: 4 rows, 16 positions; on each chip:" in lines
    assert sum("fits" in line for line in lines) == 2
    found = json.loads(last)
    assert found["decode"]["held"]["parameters"] < found["train"]["peak"]
    # Every step of decoding reads all of the decoder's kernels, and not the encoder's: more than the encoder takes.
    assert found["decode"]["flops"] > 4 * 4 * 2 * (4 * 256 + 3 * 512 + 16 * 260)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--topology=cpu", *ASKED), "no --gin_file: a job is a base, a method and a run"),
        (
            ("--topology=cpu", *ASKED, *TINY[1:], "--gin_file=methods/lora.gin", *SIZES),
            r"the macro MODEL is used but not set \(a file of gin_configs/bases sets it\)",
        ),
        (
            ("--topology=cpu", *ASKED, "--gin_file=bases/encoder_decoder.gin", *TINY[1:])
            + ("--gin_file=methods/lora.gin", *SIZES),
            "no binding sets .*T5Config.vocab_size",
        ),
        (("--topology=cpu", "--steps=trian"), "--steps trian: say train, decode or"),
        (("--topology=cpu", "--features=task"), "--features task: say FEATURE=VALUES"),
        (
            ("--topology=cpu", *ASKED, *TINY, "--gin_file=methods/lora.gin", *SIZES[:1])
            + ("--gin.BATCH_SIZE=5", "--gin.train.train.microbatches=2"),
            "the batch of 5 does not divide into 2 microbatches",
        ),
        (
            ("--topology=cpu", *ASKED, *TINY, "--gin_file=methods/lora.gin", *SIZES)
            + ("--gin.FSDP=3",),
            "1 devices cannot be divided in groups of fsdp=3 times model=1",
        ),
    ],
)
def test_mistakes_are_told_in_one_message(argv, message, capsys):
    assert aot.main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error


def test_without_libtpu_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(measure.AotError, match=r"pip install -c constraints.txt -e '.\[tpu\]'"):
        measure.devices_of("v5e:4x4")


def test_a_chip_without_figures_is_refused():
    with pytest.raises(ValueError, match="no figures for the chip 'TPU v9'.*chips.py"):
        chips.of("TPU v9")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install -c constraints.txt -e '.[tpu]'",
)


@needs_libtpu
def test_an_unknown_topology_is_refused():
    with pytest.raises(measure.AotError, match="does not give the topology 'v5e:3x7'.*v5e:16x16"):
        measure.devices_of("v5e:3x7")


@needs_libtpu
def test_a_step_is_compiled_for_a_pod():
    made = tiny("lora", "--gin.FSDP=4", "--gin.t5.T5Config.scan_layers=True")
    devices = measure.devices_of("v5e:2x2")
    program = job.training(made, devices)
    cost = measure.compile_for(program, devices[0].device_kind)
    assert cost.fits and cost.memory == int(15.75 * 2**30)
    assert cost.collectives["all-gather"] > 0 and cost.computing > 0 and cost.sending > 0
    assert cost.seconds[0] < cost.seconds[1]
