"""One training, from its settings to its last checkpoint.

- `loop`: the training loop
- `step`: one optimizer step
- `setup`: model, optimizer, DDP, CUDA graph
- `validation`: score, sample, keep the best checkpoint
- `metrics`: rows of metrics.jsonl: losses, speed, memory
- `budget`: what a training costs
- `resume`: the training state as a checkpoint and back, on any number of processes
- `optim`: Adam and the learning rate of a step
- `cuda_graph`: steps at one launch each
"""
