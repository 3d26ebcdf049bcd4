"""Our encoder with transformers' weights computes what transformers computes."""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from modjax import hub  # noqa: E402
from modjax.networks import encoder  # noqa: E402

SIZES = dict(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
)
# name -> (class, configuration, the padding token)
FAMILIES = {
    "bert": ("Bert", dict(max_position_embeddings=40), 0),
    "roberta": (
        "Roberta",
        dict(max_position_embeddings=42, type_vocab_size=1, layer_norm_eps=1e-3),
        1,
    ),
    "xlm-roberta": (
        "XLMRoberta",
        dict(max_position_embeddings=42, type_vocab_size=1, layer_norm_eps=1e-3),
        1,
    ),
}
LENGTHS = (40, 9, 23)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function: (family, outputs or 0 for none, changes of the configuration) -> (model, folder)."""

    @functools.cache
    def make(family: str, outputs: int, **changes):
        name, settings, _ = FAMILIES[family]
        labels = {"num_labels": outputs} if outputs else {}
        config = getattr(transformers, f"{name}Config")(**SIZES, **settings, **labels, **changes)
        torch.manual_seed(len(family) + outputs)
        kind = "ForSequenceClassification" if outputs else "Model"
        model = getattr(transformers, name + kind)(config)
        for path, weight in model.named_parameters():
            # Away from the initial values: norms are ones, biases zeros, attention is even.
            if weight.ndim == 1:
                torch.nn.init.normal_(weight, std=0.2)
                if "LayerNorm.weight" in path:
                    weight.data += 1.0
            else:
                scale = 1.0 if "embeddings" in path else 1.5 * weight.shape[1] ** -0.5
                torch.nn.init.normal_(weight, std=scale)
        folder = tmp_path_factory.mktemp(f"{family}-{outputs}")
        model.eval().save_pretrained(folder)
        return model, folder

    return make


def _ids(pad: int, width: int = max(LENGTHS)) -> np.ndarray:
    """Their token ids `[B, L]`, every id but the padding's among them, padded on the right."""
    drawn = np.random.default_rng(1).integers(0, SIZES["vocab_size"] - 1, (len(LENGTHS), width))
    drawn += drawn >= pad
    return np.where(np.arange(width) < np.array(LENGTHS)[:, None], drawn, pad)


def _types(family: str, ids: np.ndarray) -> np.ndarray | None:
    if family != "bert":
        return None
    return np.where(ids > 0, np.arange(ids.shape[1]) >= 5, 0).astype(np.int32)


def _theirs(model, ids, pad, types):
    given = {} if types is None else {"token_type_ids": torch.tensor(types).long()}
    with torch.no_grad():
        out = model(
            torch.tensor(ids),
            attention_mask=torch.tensor(ids != pad).long(),
            output_hidden_states=True,
            **given,
        )
    pooled = getattr(out, "pooler_output", None)
    logits = out.logits.numpy() if "logits" in out else None
    return out.hidden_states[-1].numpy(), logits, None if pooled is None else pooled.numpy()


def _largest(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max())


@pytest.mark.parametrize("outputs", [0, 3, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_outputs_equal_transformers_under_padding(saved, family, outputs):
    model, folder = saved(family, outputs)
    pad = FAMILIES[family][2]
    ids = _ids(pad)
    types = _types(family, ids)
    hidden, logits, pooled = _theirs(model, ids, pad, types)
    tokens = np.where(ids == pad, 0, ids + (pad != 0))
    real = tokens > 0

    overrides, params = hub.load_base(folder, scan_layers=outputs == 1)
    network = encoder.Transformer(encoder.EncoderConfig(**overrides))
    run = jax.jit(network.apply, static_argnames="method")
    ours = run({"params": params}, tokens, types, method="encode")
    print(f"{family} {outputs}: hidden {_largest(ours[real], hidden[real]):.1e}", end="")
    assert hidden[real].std() > 0.5
    assert _largest(ours[real], hidden[real]) < 2e-5
    if outputs:
        found = run({"params": params}, tokens, types)
        print(f", outputs {_largest(found, logits):.1e} of {np.abs(logits).max():.1f}")
        assert found.shape == logits.shape and logits.std(axis=0).min() > 0.05
        assert _largest(found, logits) < 2e-5
    else:
        pooler = params["pooler"]
        found = np.tanh(np.asarray(ours)[:, 0] @ pooler["kernel"] + pooler["bias"])
        assert _largest(found, pooled) < 2e-5


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_equal_transformers(saved, activation):
    model, folder = saved("bert", 3, hidden_act=activation)
    ids = _ids(0)
    _, logits, _ = _theirs(model, ids, 0, None)
    overrides, params = hub.load_base(folder)
    network = encoder.Transformer(encoder.EncoderConfig(**overrides))
    assert _largest(jax.jit(network.apply)({"params": params}, ids), logits) < 2e-5


def test_a_padding_token_that_is_not_zero_is_also_bert_s(saved):
    model, folder = saved("bert", 3, pad_token_id=5)
    ids = _ids(5)
    _, logits, _ = _theirs(model, ids, 5, None)
    overrides, params = hub.load_base(folder)
    network = encoder.Transformer(encoder.EncoderConfig(**overrides))
    tokens = np.where(ids == 5, 0, ids + 1)
    assert _largest(jax.jit(network.apply)({"params": params}, tokens), logits) < 2e-5
