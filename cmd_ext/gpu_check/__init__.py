"""python -m cmd_ext gpu-check: proof and timing of the CUDA kernels on a GPU."""
