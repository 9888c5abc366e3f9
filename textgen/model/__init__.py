"""The LSTM language model.

- `lstm`: the layers, the model and its loss
- `neighbours`: an embedding that starts from the text
- `files`: reads and writes models, fetches them from the hub
"""
