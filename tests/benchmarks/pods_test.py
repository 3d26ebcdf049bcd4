"""The pods' cells are jobs that gin accepts, bases have their published sizes, and goals are read off the results."""

import math

import jax
import pytest

from benchmarks.pods import __main__ as pods
from modjax import initialize
from modjax.aot import job


@pytest.mark.parametrize(
    ("base", "parameters"), [("mt5_xl", 3.74e9), ("mt5_xxl", 12.92e9), ("llama3_8b", 8.03e9)]
)
def test_a_cell_is_a_job_on_a_base_of_the_published_size(base, parameters):
    made = job.from_gin(pods.flags_of(base, "flix", 16), pods.FEATURES, 8)
    assert made.batch_size == 16 * pods.BASES[base].rows and made.base_dtype == "bfloat16"
    batch = made.model.example_batch(made.lengths, made.model.adapted.space, 8)
    layout = initialize.layout(made.model, batch, (), made.partitioner)
    sizes = [
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (layout.frozen, layout.trained)
    ]
    assert sizes[0] == pytest.approx(parameters, rel=2e-3)
    # 200 values of rank 4 beside each query and value.
    config = made.model.network.config
    heads = config.num_heads * config.head_dim
    if base == "llama3_8b":
        width = 2 * config.emb_dim + heads + config.num_kv_heads * config.head_dim
        assert sizes[1] == 800 * config.num_layers * width
    else:
        sites = 2 * config.num_encoder_layers + 4 * config.num_decoder_layers
        assert sizes[1] == 800 * sites * (config.emb_dim + heads)


def cell(computing, fits=True, added=0.0, **more):
    """A result as measure_cell makes it."""
    return {
        "fits": fits,
        "peak": 2**34,
        "tokens": 4096,
        "flops": 1e13,
        "collectives": {"all-gather": 100.0},
        "added": added,
        "computing": computing,
        "sending": 0.5,
        "mfu": [0.2, 0.4],
        **more,
    }


def test_goals_and_table_say_what_holds():
    results = {
        "mt5_xl lora v5e-16": cell(1.0),
        "mt5_xl lora v5e-256": cell(1.1),
        "mt5_xl flix v5e-16": cell(1.0, added=0.5),
        "mt5_xl flix v5e-256": cell(1.2, added=2.0),
        "mt5_xxl flix v5e-16": cell(0.0, fits=False),
    }
    found = {goal["name"]: (goal["value"], goal["holds"]) for goal in pods.goals(results)}
    assert found == {
        "mt5_xl lora: seconds a step, 256 chips over 16": (1.0667, True),
        "mt5_xl flix: seconds a step, 256 chips over 16": (1.1333, False),
        "mt5_xl flix v5e-16: its own collectives, of all bytes": (0.005, True),
        "mt5_xl flix v5e-256: its own collectives, of all bytes": (0.02, False),
    }
    lines = pods.table(results)
    assert len({line.count("|") for line in lines}) == 1
    assert "| mt5_xxl | flix | v5e-16 | no |" in lines[-1]
