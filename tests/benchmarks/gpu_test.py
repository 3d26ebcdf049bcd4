"""The benchmark of large bases on a GPU, with a tiny one on whatever there is."""

import json

import pytest

from benchmarks import gpu, measure


@pytest.mark.parametrize("side", gpu.OURS)
def test_a_side_trains_and_counts_what_the_base_needs(side, monkeypatch):
    monkeypatch.setattr(gpu, "STEPS", 2)
    found = gpu.measured("tiny", side)
    assert found["rows"] == 2 and found["tokens"] == 2 * 16 and len(found["seconds"]) == 2
    assert found["losses"][-1] < found["losses"][0]
    sizes, tokens = gpu.CASES["tiny"].sizes, 32
    joined = sizes["num_heads"] * sizes["head_dim"]
    layer = 4 * sizes["emb_dim"] * joined + 3 * sizes["emb_dim"] * sizes["mlp_dim"]
    kernels = sizes["num_layers"] * layer + sizes["emb_dim"] * sizes["vocab_size"]
    attention = sizes["num_layers"] * 2 * 16 * joined  # logits and means, over all pairs
    assert found["flops"] == 2 * tokens * (2 * kernels + 3 * attention)


def test_what_does_not_fit_is_tried_with_fewer_rows(monkeypatch, capsys):
    def side(case, name, rows, profile):
        if rows > 12:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"seconds": [1.0]}

    monkeypatch.setattr(gpu, "our_side", side)
    assert gpu.measured("llama_7b", "lora")["rows"] == 12
    assert "llama_7b lora: 16 rows do not fit" in capsys.readouterr().err


def test_ours_is_compared_with_the_fastest_of_theirs(capsys):
    def run(rows, second, **more):
        return [
            {
                "device": "NVIDIA H100",
                "rows": rows,
                "tokens": 1000.0,
                "seconds": [second],
                "peak": 0,
            }
            | more
        ]

    found = {
        "lora": run(4, 1.0, flops=4e14),
        "peft": run(2, 2.0),
        "peft_bfloat16": run(2, 1.6),
    }
    goals = gpu._summary("t5_xl", found, lambda kind: 1e15)
    assert goals == [
        measure.goal("t5_xl lora: MFU", 0.4, 0.5, at_least=True),
        measure.goal("t5_xl lora / peft_bfloat16: speed", 1.6, 1.5, at_least=True),
    ]
    assert "| lora | 4 |" in capsys.readouterr().out
    assert json.dumps(goals)
