"""Compiled code beside plain twins that define what is right: C++ for CPUs, CUDA graphs, Triton.

- `compile`: C++ compiled at first use, and kept
- `training`: LSTM and softmax of a training step (training.cpp)
- `decoding`: an int8 decoding step, and the draw (decoding.cpp)
- `capture`: capture and replay of CUDA graphs
- `triton_kernels`: fused gates and draw for GPUs; experimental, used by no decoder yet
"""
