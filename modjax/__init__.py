"""modjax: adapt one frozen language model to many tasks in many languages.

Nothing is imported here, so that `import modjax` is fast and a part can be used where the packages of another
part are not installed: the adapters need jax, flax and optax; only `modjax.data` and `modjax.evaluation` need SeqIO.
"""

__version__ = "0.1.0"
