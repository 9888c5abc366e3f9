"""Trackers that follow metrics.jsonl: none of them can end or slow a training.

- `tracker`: writes metrics.jsonl and calls trackers on threads
- `wandb`: Weights & Biases
- `backends`: which trackers there are; TensorBoard and trackio
"""
