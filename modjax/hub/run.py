"""A trained model from its checkpoint alone: what a run wrote down is enough to build it again."""

import ast
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modjax import adapters, checkpoints, initialize, models, provenance
from modjax.adapters import trees
from modjax.hub import hf_t5
from modjax.hub.base import Base, is_base, load_base, open_base
from modjax.hub.errors import HubError, listed
from modjax.hub.layers import flatten, unstack_layers

MODELS = {
    "t5": models.EncoderDecoderModel,
    "decoder": models.DecoderOnlyModel,
    "encoder": models.EncoderModel,
}

# What changes an unrolled layer: modules that are composed for one dataset, and their parameters.
Layers = dict[str, list[tuple[Any, dict[str, np.ndarray]]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
      checkpoint: its folder.
      folder: that of its base.
      base: the base's headers.
      model: bound to the checkpoint's feature space.
      params: of base and adapters, nested dicts of host arrays.
      trained: the names of those that trained.
    """

    checkpoint: Path
    folder: Path
    base: Base
    model: models.Model
    params: dict[str, Any]
    trained: tuple[str, ...]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the network's configuration that weights decide about."""
        return {name: getattr(self.model.network.config, name) for name in self.base.kind.fields}

    @property
    def trained_base(self) -> list[str]:
        """The parameters of the network itself that trained, without a task's own output layer."""
        names = set(self.model.adapted.names if self.model.adapted else ())
        return [
            path
            for path in self.trained
            if not names & set(path.split("/")) and not initialize.is_head(path)
        ]

    def network_params(self) -> dict[str, np.ndarray]:
        """The network's parameters by name, unrolled; those of scanned layers are views."""
        params = self.params
        if self.model.adapted is not None:
            _, params = adapters.split(params, self.model.adapted)
        return flatten(unstack_layers(params))

    def huggingface(self) -> dict[str, Any]:
        """The config.json that the base came with, or one like it.

        Raises:
          HubError: the base never came from Hugging Face, and which of their models it is cannot be told.
        """
        if self.base.huggingface is not None:
            return dict(self.base.huggingface)
        if self.base.network == "t5":
            return hf_t5.config_of(self.fields)
        raise HubError(
            f"the base {self.folder} never came from Hugging Face (its config.json has no 'huggingface'), so that it "
            "is none of their models. `import_hf` makes bases that are."
        )

    def compose(self, features: Mapping[str, Any]) -> Layers:
        """What the adapters amount to for one dataset, {unrolled layer: modules to apply in that order}.

        Args:
          features: the dataset's, by name; "dataset" where datasets own modules or logits.

        Raises:
          UnknownFeatureError: an unknown feature, value or dataset; the known ones are named.
          ValueError: nothing is active for these features, or a learned router asks for another one.
        """
        adapted = self.model.adapted
        if adapted is None:
            if features:
                raise HubError(
                    f"{self.checkpoint} has no adapters (it trained the network itself), which is the same for every "
                    "dataset: leave the features out."
                )
            return {}
        assert adapted.space is not None
        for rule in adapted.rules:
            rows = rule.mixture.router.rows(adapted.space)
            by = rule.mixture.router.routes_by
            if rows and features and by and by[0] not in features:
                raise HubError(
                    f"{rule.mixture.name!r} is routed by {by[0]}: say {by[0]}=NAME, one of {listed(list(rows))}; "
                    "without any feature its modules are averaged."
                )
        added, _ = adapters.split(self.params, adapted)
        composed, leaves = adapters.compose(adapted, added, **features)
        layers: Layers = {}
        for (path, name), bank in trees.banks(leaves, composed).items():
            module = composed.rule_for(path, name).mixture.module
            host = {leaf: np.asarray(value, np.float32) for leaf, value in bank.items()}
            if "/layers/" not in path:
                layers.setdefault(path, []).append((module, host))
                continue
            for i in range(len(next(iter(host.values())))):
                layer = path.replace("/layers/", f"/layers_{i}/", 1)
                own = {leaf: value[i] for leaf, value in host.items()}
                layers.setdefault(layer, []).append((module, own))
        return layers


def open_run(run: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Run:
    """Builds a trained model again.

    Args:
      run: a checkpoint, or a MODEL_DIR, whose latest one is taken.
      base: the folder of its base's weights; None for the one it was trained with (BASE), as it was written there.

    Raises:
      CheckpointError: damaged, or made with another base.
      HubError: the base is not where it was, or is not one.
    """
    where = checkpoints.locate(run)
    metadata = checkpoints.read_metadata(where)
    folder = Path(_base_of(metadata, where) if base is None else base)
    if base is None and not is_base(folder):
        raise HubError(
            f"{where} was trained on the base {folder}, which is not here: say where it is (--base FOLDER)."
        )
    opened = open_base(folder)
    paths = dict.fromkeys([*metadata["trained"], *metadata["base"]["arrays"]])
    scan = bool(provenance.is_scanned(paths))
    changes = {"scan_layers": scan, **_head(metadata["trained"])}
    network = opened.kind.network(opened.kind.config(**{**opened.fields, **changes}))
    if metadata["method"] != "full":
        network = adapters.Adapted(network, adapters.rules_of(metadata["method"]))
    model = MODELS[opened.network](network)
    _, weights = load_base(folder, scan_layers=scan)
    model, params, _, _ = initialize.restore(model, where, weights)
    prefix = re.search(
        r"^(?:\S*\.)?DecoderOnlyModel\.prefix = (\S+)", metadata["gin"], re.MULTILINE
    )
    if prefix and (
        _macro(metadata["gin"], prefix[1][1:]) if prefix[1][0] == "%" else prefix[1] == "True"
    ):
        raise HubError(
            f"{where} was trained as a prefix language model (DecoderOnlyModel.prefix): its inputs see each other in "
            "both directions, which the causal models of transformers do not compute."
        )
    return Run(where, folder, opened, model, params, tuple(metadata["trained"]))


def _base_of(metadata: Mapping[str, Any], where: Path) -> str:
    """The folder that a run's gin configuration names."""
    base = _macro(metadata["gin"], "BASE")
    if base is None or base == initialize.RANDOM:
        why = "does not say on which base it was trained"
        if base is not None:
            why = "was trained from random weights"
        raise HubError(
            f"{where} {why}: say which folder has its network (--base FOLDER; EXPORT_DIR of a run writes one)."
        )
    return str(base)


def _macro(gin: str, name: str) -> Any:
    """The value of a macro in a gin configuration; None where it is not set."""
    found = re.search(rf"^{name} = (.*(?:\n[ \t]+.*)*)", gin, re.MULTILINE)
    if found is None:
        return None
    value = found[1].replace("\\\n", "\n").strip()
    if value.startswith("%"):
        return _macro(gin, value[1:])
    return ast.literal_eval(f"({value})")


def _head(trained: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the head that a run trained; none where it did not train one."""
    described = trained.get("classifier/logits_dense/kernel")
    if described is None:
        return {}
    outputs = re.search(r",\s*(\d+)\]", described)
    assert outputs is not None, described
    head = "dense" if "classifier/dense/kernel" in trained else "pooled"
    return {"head": head, "num_outputs": int(outputs[1])}
