"""Prompts to texts.

- `generation`: samples in a batch whose rows are refilled
- `sampling`: filters on logits and the draw, as pure functions
- `decoders`: one step of a model
- `products`: matrix products on packed weights
- `choose`: the choice of a decoder
- `cuda_graphs`: many steps at one launch
- `export`: decoders as files, and what a decoder costs
- `onnx`: one step as a module that ONNX can hold
"""
