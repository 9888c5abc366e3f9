"""The files of a run.

- `lock`: a lock on a file, also on disks without locks
- `directory`: the run's lock, status and free space
- `checkpoint`: checkpoints: written, found, verified, pruned
- `copies`: copies of checkpoints at an address: made in the background, fetched, pruned
- `tensors`: safetensors files, written without copies and checked before they are read
- `metrics_file`: metrics.jsonl
- `samples`: samples.md
- `environment`: versions, commit and machine of a training
"""
