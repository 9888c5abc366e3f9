"""Trackers that follow metrics.jsonl: none of them can end or slow a training.

- `tracker`: writes metrics.jsonl and calls trackers on threads
- `recorded`: the rows that each tracker was given, to tell another history
- `wandb`: Weights & Biases
- `wandb_settings`: W&B's own switches and settings, read without wandb
- `accelerate_trackers`: TensorBoard and trackio, through Accelerate
- `backends`: builds the trackers that a training asks for
"""
