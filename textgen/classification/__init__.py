"""The label of a text: by the bits that it takes under each label, or by a head on the states of the LSTM.

- `reading`: what texts cost after each label, and the pooled states of texts
- `head`: a small network on pooled states; its training and its files
- `classifier`: a model and how it judges texts; the true labels of texts
- `decision`: scores to labels with margins and probabilities; the fit of the temperature
- `figures`: accuracy with its interval, confusion table, calibration
"""
