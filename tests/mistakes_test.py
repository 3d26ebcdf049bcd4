"""A mistake of the user's is one line that names the binding; a bug keeps its trace."""

import functools

import jax
import pytest

from modjax import adapters, mistakes

FILES = ("--gin_file=bases/t5_small.gin", "--gin_file=methods/flix.gin")
SET = (
    "--gin.MIXTURE_OR_TASK_NAME='m'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}",
    "--gin.BASE='random'",
)
TRAIN = (*FILES, "--gin_file=runs/finetune.gin", *SET, "--gin.TRAIN_STEPS=3", "--gin.MODEL_DIR='d'")
EVAL = (
    *FILES,
    "--gin_file=runs/eval.gin",
    *SET,
    "--gin.CHECKPOINT_PATH='c'",
    "--gin.EVAL_OUTPUT_DIR='d'",
)


def train(*argv):
    import train as entry

    return entry.main(argv)


def evaluate(*argv):
    import eval as entry

    return entry.main(argv)


def test_a_rank_of_zero_is_one_line_that_names_the_binding(capsys):
    assert train(*TRAIN, "--gin.adapters.LowRank.rank=0") == 2
    assert capsys.readouterr().err == (
        "error: LowRank.rank must be an integer of at least 1, got 0. "
        "(on the command line: adapters.LowRank.rank = 0)\n"
    )


def test_a_value_from_a_file_is_named_with_file_line_and_the_macros_it_is_made_of(tmp_path, capsys):
    (tmp_path / "inner.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom modjax import adapters\n"
        "RANK = 3\nadapters.LowRank:\n  alpha = 2.0\n  rank = %RANK\n"
    )
    outer = tmp_path / "outer.gin"
    outer.write_text(f"include '{tmp_path}/inner.gin'\nRANK = 0\n")
    assert train(*TRAIN, f"--gin_file={outer}") == 2
    said = capsys.readouterr().err
    assert (
        f"({tmp_path}/inner.gin, line 6: adapters.LowRank.rank = %RANK; {outer}, line 2: " in said
    )
    assert said.endswith("RANK = 0)\n") and said.count("\n") == 1


def test_bindings_are_read_from_every_file_that_can_be_found(tmp_path):
    """gin also finds files inside Python packages; a job that includes one must not fail for it."""
    path = tmp_path / "mine.gin"
    path.write_text("A = 1\ninclude 'package/x.gin'\nscope/t5.T5Config.emb_dim = %A\n")

    def find(name):
        raise ValueError(name)

    assert list(mistakes.read_bindings(str(path), find)) == [
        ("A", "1", f"{path}, line 1"),
        ("scope/t5.T5Config.emb_dim", "%A", f"{path}, line 3"),
    ]


@pytest.mark.parametrize(
    ("run", "argv", "message"),
    [
        (
            evaluate,
            (*EVAL, "--gin.models.EncoderDecoderModel.decoder='beem'"),
            "Did you mean 'beam'? Known: greedy, sample, beam. "
            "(on the command line: models.EncoderDecoderModel.decoder = 'beem')",
        ),
        (
            train,
            (*TRAIN, "--gin.FEATURE_DROPOUT=2.0"),
            "on the command line: FEATURE_DROPOUT = 2.0)",
        ),
        (
            train,
            (*TRAIN, "--gin.TRAIN_STEPS=0"),
            "schedule.total_steps must be an integer of at least 1, got 0.",
        ),
        (train, (*TRAIN, "--gin.TRAIN_STEPS='3'"), "on the command line: TRAIN_STEPS = '3')"),
        (
            train,
            (*TRAIN, "--gin.OPTIMIZER=@optimizers.Optimizer()", "--gin.train.train.train_steps=0"),
            "train.train_steps must be an integer of at least 1, got 0. (on the command line: ",
        ),
        (
            train,
            (*TRAIN, "--gin.LEARNING_RATE='0.1'"),
            "schedule.peak must be a number of at least 0, got '0.1'. (",
        ),
        (train, (*TRAIN, "--gin.WARMUP='0.1'"), "on the command line: WARMUP = '0.1')"),
        (train, (*TRAIN, "--gin.LEARNING_RATE=-0.1"), "on the command line: LEARNING_RATE = -0.1)"),
        (
            train,
            (*TRAIN, "--gin.optimizers.Optimizer.learning_rate='0.1'"),
            "Optimizer.learning_rate must be a number of at least 0, got '0.1'. (on the command",
        ),
        (train, (*TRAIN, "--gin.BATCH_SIZE='8'"), "batch_size must be an integer of at least 1"),
        (
            evaluate,
            (*EVAL, "--gin.RANDOM_SEED='a'"),
            "evaluate.random_seed must be an integer of at least 0, got 'a'. (",
        ),
        (train, (*TRAIN, "--gin.DTYPE='bf16'"), "on the command line: DTYPE = 'bf16')"),
        (
            train,
            (*TRAIN, "--gin.DTYPE='float16'"),
            "T5Config.dtype must be one of ('float32', 'bfloat16'), got 'float16'. (",
        ),
        (train, (*TRAIN, "--gin.DROPOUT_RATE='0'"), "on the command line: DROPOUT_RATE = '0')"),
        (
            train,
            (*TRAIN, "--gin.t5.T5Config.emb_dim='8'"),
            "T5Config.emb_dim must be an integer, got '8'. (on the command line: ",
        ),
        (
            train,
            (*TRAIN, "--gin.adapters.LowRank.alpha='x'"),
            "LowRank.alpha must be positive, got 'x'. (on the command line: ",
        ),
        (
            train,
            (*TRAIN, "--gin.ROUTER=@adapters.Features"),
            "Mixture.router is the class Features, not an object of it: write @adapters.Features()",
        ),
        (
            train,
            (*TRAIN, "--gin.BANK=@some/adapters.LowRank"),
            "Mixture.module is the class LowRank, not an object of it: write @adapters.LowRank()",
        ),
        (train, (*TRAIN, "--gin.t5.T5Config.num_heads=0"), "T5Config.num_heads must be at least 1"),
        (
            train,
            (*TRAIN, "--gin.ADAPTED_LAYERS='('"),
            "adapters.Rule.pattern = %ADAPTED_LAYERS; on",
        ),
        (train, (), "no gin file is about train.train: a job is a base, a method and a run"),
        (
            train,
            ("--gin.train.train.method='m'",),
            "no binding sets train.base, train.batch_size, ",
        ),
    ],
)
def test_what_is_wrong_in_a_binding_is_one_line(run, argv, message, capsys):
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ")
    assert said.count("\n") == 1 and "In call to configurable" not in said


def test_the_trace_of_a_mistake_is_there_for_the_asking():
    with pytest.raises(ValueError, match="LowRank.rank must be"):
        train(*TRAIN, "--gin.adapters.LowRank.rank=0", "--traceback")


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_a_bug_keeps_its_trace(error, monkeypatch, capsys):
    """A failure in a library called from our code, with no mistake of the user's."""
    fails = functools.partial(int, *{ValueError: ("x",), TypeError: (None,)}[error])
    monkeypatch.setattr(adapters.LowRank, "__post_init__", fails)
    with pytest.raises(error, match="int()"):
        train(*TRAIN)
    assert "error:" not in capsys.readouterr().err


CODE = """
import jax, numpy as np

def refuse(x):
    raise ValueError(
        f"unknown {x}"
    )

def refuse_and_clean_up(x):
    try:
        with jax.named_scope("scope"):
            raise ValueError("unknown")
    finally:
        x = None

def fail_in_c(x):
    if x is None:
        raise ValueError("not this one")
    return int("text")

def fail_in_numpy(x):
    return np.zeros(3).reshape(2)

def fail_in_jax(x):
    return jax.vmap(lambda y: y)(x)
"""


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("refuse", True),
        ("refuse_and_clean_up", True),
        ("fail_in_c", False),
        ("fail_in_numpy", False),
        ("fail_in_jax", False),
    ],
)
def test_a_value_error_is_the_users_if_our_code_raises_it(name, users, jit):
    """Also where jax hides its own frames, so that the last one to be seen is ours."""
    for module in ("modjax.made_up", "tasks.made_up", "somebody_elses"):
        scope = {"__name__": module}
        exec(CODE, scope)
        function = jax.jit(scope[name]) if jit else scope[name]
        with pytest.raises(ValueError) as caught:
            function(1.0)
        assert mistakes.is_users(caught.value) == (users and module != "somebody_elses")
