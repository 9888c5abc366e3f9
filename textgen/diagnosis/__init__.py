"""Is this machine, or this allocation, ready for a training? The checks of `textgen doctor`, by topic.

- `checks`: all checks in their order
- `results`: the result of a check; one report from the results of all processes
- `process_group`: join the processes, gather their values, continue alone after a loss
- `machine`: versions, GPUs, processors, limits
- `precision`: the dtypes in which an LSTM trains, and their speed
- `network`: an all-reduce and the clocks
- `storage`: the disk of the run and its free space
- `inputs`: text, tokenizer, W&B
- `timing`: the duration of an action on a device
"""
