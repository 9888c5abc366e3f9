"""Trackers that follow metrics.jsonl: none of them can end or slow a training.

- `tracker`: writes metrics.jsonl and calls trackers on threads
- `wandb`: Weights & Biases
- `accelerate_trackers`: TensorBoard and trackio, through Accelerate
- `backends`: builds the trackers that a training asks for
"""
