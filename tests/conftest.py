"""Small things that many tests share: a tiny T5, a feature space, batches, and adapters away from their start."""

import os
import sys

# Tests compile far more than they compute: let XLA spend less on its programs. Its emitters of fused loops, which go
# through MLIR, are a large part of what it spends on them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false"
)
# Where a test wants compiled programs to be kept, it says so; none goes to the user's cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from modjax.features import FeatureSpace  # noqa: E402
from modjax.networks import decoder, encoder, t5  # noqa: E402

VOCAB = 50
SIZES = dict(emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32)


@pytest.fixture(autouse=True)
def _gin_is_forgotten():
    """A test that parses gin files leaves gin locked; the next one finds it as it was."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config(clear_constants=True)


@pytest.fixture(scope="session")
def space() -> FeatureSpace:
    return FeatureSpace(
        (("task", ("parse", "tag")), ("language", ("en", "sw", "yo"))),
        datasets=("parse_en", "tag_sw", "parse_yo"),
    )


@pytest.fixture(scope="session")
def make_t5():
    """Builds a tiny T5; keywords replace its config's."""

    def make(**options) -> t5.Transformer:
        own = dict(vocab_size=VOCAB, num_encoder_layers=2, num_decoder_layers=2)
        sizes = SIZES | own
        return t5.Transformer(t5.T5Config(**(sizes | options)))

    return make


@pytest.fixture(scope="session")
def make_decoder():
    """Builds a tiny decoder-only network; keywords replace its config's."""

    def make(**options) -> decoder.Transformer:
        sizes = SIZES | dict(vocab_size=VOCAB - 1, num_kv_heads=1, num_layers=2)
        return decoder.Transformer(decoder.DecoderConfig(**(sizes | options)))

    return make


@pytest.fixture(scope="session")
def make_encoder():
    """Builds a tiny encoder with a head of three classes; keywords replace its config's."""

    def make(**options) -> encoder.Transformer:
        own = dict(vocab_size=VOCAB, num_layers=2, max_positions=20, head="pooled", num_outputs=3)
        sizes = SIZES | own
        return encoder.Transformer(encoder.EncoderConfig(**(sizes | options)))

    return make


@pytest.fixture(scope="session")
def batch() -> dict:
    """Three unpacked examples with features: (parse, sw), (tag, none), (parse, yo)."""
    rng = np.random.RandomState(0)
    inputs, targets = rng.randint(2, VOCAB, (3, 7)), rng.randint(2, VOCAB, (3, 6))
    inputs[1, 5:], targets[1, 4:] = 0, 0
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    return {
        "encoder_input_tokens": jnp.asarray(inputs),
        "decoder_input_tokens": jnp.asarray(shifted),
        "decoder_target_tokens": jnp.asarray(targets),
        "features": jnp.array([[[1, 2]], [[2, 0]], [[1, 3]]], jnp.int32),
        "tasks": jnp.array([[1], [2], [3]], jnp.int32),
    }


@pytest.fixture(scope="session")
def decoder_batch(batch) -> dict:
    """The examples of `batch` as one sequence each, inputs before targets, behind the token 1; and their prompts."""
    rows, width = [], 14
    for inputs, targets in zip(
        np.asarray(batch["encoder_input_tokens"]),
        np.asarray(batch["decoder_target_tokens"]),
        strict=True,
    ):
        asked, told = inputs[inputs > 0], targets[targets > 0]
        both = np.concatenate([asked, told])
        rows.append(
            {
                "decoder_input_tokens": np.concatenate([[1], both[:-1]]),
                "decoder_target_tokens": both,
                "decoder_loss_weights": np.repeat([0, 1], [len(asked), len(told)]),
                "decoder_causal_attention": np.repeat([1, 0], [len(asked) + 1, len(told) - 1]),
                "decoder_prompt_tokens": np.concatenate([[1], asked]),
                "decoder_answer_tokens": told,
            }
        )
    widths = {"decoder_prompt_tokens": 8, "decoder_answer_tokens": 6}
    return {
        **{
            name: jnp.asarray(
                [np.pad(row[name], (0, widths.get(name, width) - len(row[name]))) for row in rows]
            )
            for name in rows[0]
        },
        "features": batch["features"],
        "tasks": batch["tasks"],
    }


@pytest.fixture(scope="session")
def encoder_batch(batch) -> dict:
    """The inputs of `batch`, each with a class."""
    return {
        "encoder_input_tokens": batch["encoder_input_tokens"],
        "labels": jnp.array([[2], [1], [3]], jnp.int32),
        "features": batch["features"],
        "tasks": batch["tasks"],
    }


@pytest.fixture(scope="session")
def move_adapters():
    """Gives every `b` random values, so that the adapters do something."""

    def move(params, seed: int = 1, size: float = 0.1):
        keys = iter(jax.random.split(jax.random.key(seed), 500))
        return jax.tree_util.tree_map_with_path(
            lambda path, x: (
                size * jax.random.normal(next(keys), x.shape) if path[-1].key == "b" else x
            ),
            params,
        )

    return move


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Runs of one shape compile one program; it is read back from disk by those after the first."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.5), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
