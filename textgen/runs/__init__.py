"""What a run leaves on disk.

- `directory`: the run's lock, status and free space
- `checkpoint`: checkpoints: written whole, found, verified, pruned
- `tensors`: safetensors files, written without copies and read with suspicion
- `metrics_file`: metrics.jsonl
- `samples`: samples.md
- `environment`: what a training ran on
"""
