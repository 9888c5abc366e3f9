"""The LSTM language model.

- `lstm`: the layers, the model and its loss
- `files`: reads and writes models, fetches them from the hub
"""
