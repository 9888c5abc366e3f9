"""From prompts to texts.

- `generation`: the loop; samples in a batch whose rows are refilled
- `batch`: the rows on the device, and one step of them
- `samples`: a request, and its text while it grows and at its end
- `sampling`: filters on logits and the draw, as pure functions
- `steering`: settings that name texts
- `guides`: texts that match a regex or are one of a list
- `decoders`: one step of a model
- `fused`: one step on a GPU in a few kernels, with its draw
- `pieces`: short prompts read side by side on a GPU
- `reading`: a text that was read, so that others can begin with it
- `state_files`: such a text in a file, bound to its model
- `draft`: a text that a user and a model write in turns, with its earlier states
- `scoring`: log-probabilities of a given text
- `products`: matrix products on packed weights
- `choose`: the choice of a decoder
- `cuda_graphs`: many steps with one launch
- `export`: decoders as files, and what a decoder costs
- `onnx`: one step as an ONNX file, and a decoder that runs it
"""
