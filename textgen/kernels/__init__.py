"""Compiled code, beside plain twins that define the right results: C++ for CPUs, CUDA graphs, Triton.

- `compile`: compiles C++ at first use, and keeps it
- `training`: LSTM and cross-entropy of a training step (training.cpp)
- `amx`: whether the LSTM is trained by AMX, which is measured
- `decoding`: an int8 decoding step, and the draw (decoding.cpp)
- `capture`: capture and replay of CUDA graphs
- `fused`: whether a device has the kernels of `triton_training`
- `triton_training`: dropout, masks of weights, and cross-entropy of a training step on a GPU
- `fused_decoding`: the parts of a decoding step that are one kernel each on a GPU, by torch's operators
- `triton_decoding`: these kernels
- `triton_noise`: the hash of both kinds of kernels
"""
