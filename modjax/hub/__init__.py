"""Weights of other people in, our own in and out: folders of safetensors, without torch.

Only `import_hf` of a model that has nothing but pytorch_model.bin needs torch.

From the command line: `python -m modjax.hub`.

overrides, params = hub.load_base("checkpoints/mt5-small", dtype="bfloat16")
network = t5.Transformer(t5.T5Config(**overrides, dtype="bfloat16"))
"""

from modjax.hub.base import config_of, is_base, load_base, load_config, save_base
from modjax.hub.errors import HubError
from modjax.hub.hf_import import import_hf
from modjax.hub.layers import stack_layers, unstack_layers

__all__ = [
    "HubError",
    "config_of",
    "import_hf",
    "is_base",
    "load_base",
    "load_config",
    "save_base",
    "stack_layers",
    "unstack_layers",
]
