"""Our T5 with transformers' weights computes what transformers computes."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from modjax import hub  # noqa: E402
from modjax.networks import layers, t5  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*scales umT5's logits")

VARIANTS = ("t5", "t5_1_1", "t5_1_1_tied", "mt5", "mt5_tied", "byt5", "umt5", "umt5_tied")
SCANNED = ("t5", "mt5", "umt5")


def _padded(seed: int, lengths: list[int], width: int) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(2, 67, (len(lengths), width)).astype(np.int32)
    return np.where(np.arange(width)[None] < np.array(lengths)[:, None], tokens, 0).astype(np.int32)


def _theirs(model, inputs, shifted, targets):
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(inputs),
            attention_mask=torch.tensor(inputs > 0),
            decoder_input_ids=torch.tensor(shifted),
            decoder_attention_mask=torch.tensor(targets > 0),
            output_hidden_states=True,
        )
        encoded = model.encoder(torch.tensor(inputs), torch.tensor(inputs > 0)).last_hidden_state
    return encoded.numpy(), out.logits.numpy()


@pytest.mark.parametrize(
    "variant, scan_layers", [(v, False) for v in VARIANTS] + [(v, True) for v in SCANNED]
)
def test_encoder_output_and_logits_equal_transformers_under_padding(hf_t5, variant, scan_layers):
    model, folder = hf_t5(variant)
    # 150 tokens reach the last position bucket, which holds distances of 128 and more.
    inputs = _padded(1, [150, 9, 73], 150)
    targets = _padded(2, [140, 7, 20], 140)
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    encoded, logits = _theirs(model, inputs, shifted, targets)

    overrides, params = hub.load_base(folder, scan_layers=scan_layers)
    network = t5.Transformer(t5.T5Config(**overrides))
    ours_encoded = network.apply({"params": params}, inputs, method="encode")
    ours = jax.jit(network.apply)({"params": params}, inputs, shifted, targets)

    real = inputs > 0
    encoder_difference = np.abs(np.asarray(ours_encoded) - encoded)[real].max()
    difference = np.abs(np.asarray(ours) - logits)[targets > 0].max()
    largest = np.abs(logits).max()
    print(f"{variant}: encoder {encoder_difference:.1e}, logits {difference:.1e} of {largest:.1f}")
    assert logits[targets > 0].std() > 0.05
    assert encoder_difference < 2e-5
    assert difference < 2e-5


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, far", [(32, 128), (16, 40), (64, 256)])
def test_position_buckets_equal_transformers(bidirectional, buckets, far):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-2 * far, 2 * far + 1)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(relative), bidirectional, num_buckets=buckets, max_distance=far
    ).numpy()
    table = layers.position_buckets(bidirectional, buckets, far)
    np.testing.assert_array_equal(table[np.clip(relative, -far, far) + far], theirs)
