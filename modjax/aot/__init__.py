"""What a job costs on a TPU pod, found by compiling it for one on a machine without any: `python -m modjax.aot`."""
