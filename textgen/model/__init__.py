"""The LSTM language model.

- `lstm`: the layers, the model and its loss
- `files`: reading and writing it, and the hub
"""
