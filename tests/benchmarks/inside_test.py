"""What trained adapters hold, against the plain formula."""

import jax
import numpy as np

from benchmarks import inside
from modjax import adapters
from modjax.features import FeatureSpace

SPACE = FeatureSpace((("task", ("parse", "tag")), ("language", ("ta",))), ("parse_ta", "tag_ta"))


def described(module, router):
    rule = adapters.Rule(".*", adapters.Mixture("mix", module, router))
    return adapters.describe_method(adapters.Adapted(None, (rule,), SPACE))


def test_norms_are_those_of_each_modules_update():
    draw = np.random.default_rng(0)
    method = described(adapters.LowRank({"task": 2, "language": 1}), adapters.Features())
    sites = {
        name: {"mix": {"a": draw.normal(size=(6, 5)), "b": draw.normal(size=(5, 4))}}
        for name in ("wi", "wo")
    }
    found = inside.norms({"encoder": {"layers_1": {"mlp": sites}}}, method)
    for module, columns in {"task=tag": [2, 3], "language=ta": [4]}.items():
        updates = [s["mix"]["a"][:, columns] @ s["mix"]["b"][columns] for s in sites.values()]
        expected = np.linalg.norm(np.concatenate([update.ravel() for update in updates]))
        np.testing.assert_allclose(found["encoder 1"][module], expected, atol=1e-3)


def test_routing_is_the_mean_of_normalised_sigmoids():
    method = described(adapters.LowRank(2), adapters.Skills(3))
    logits = np.random.default_rng(0).normal(size=(2, 2, 1, 3))
    trained = {f"layer{i}": {"mix": {"logits": logits[i]}} for i in range(2)}
    share = np.asarray(jax.nn.sigmoid(logits))[:, :, 0]
    share = (share / share.sum(-1, keepdims=True)).mean(0)
    found = inside.routing(trained, method)
    np.testing.assert_allclose(found["parse_ta"], share[0], atol=1e-3)
    np.testing.assert_allclose(found["tag_ta"], share[1], atol=1e-3)
