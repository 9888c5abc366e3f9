"""One training, from its settings to its last checkpoint.

- `loop`: the training loop; what happens before and after it
- `step`: one optimizer step: `StepLoader`, `Learner`, `train_step`
- `start`: the weights and the shape of a base: `--init_from`
- `setup`: build a `Learner` and a `Training`: model, optimizer, DDP, CUDA graph
- `validation`: score, sample, choose the best checkpoint
- `metrics`: rows of metrics.jsonl: losses, speed, memory
- `profile`: traces of some steps: `--profile`
- `budget`: timed steps, `max_minutes`, the dry run
- `tuning`: a search of learning rate and batch size by short trainings
- `resume`: the training state as a checkpoint and back, on any number of processes
- `copying`: copies of checkpoints at an address: fetched before the first step, finished after the last
- `optim`: Adam, the learning rate of a step, the update
- `cuda_graph`: steps from a CUDA graph
"""
