"""Train an LSTM language model on IMDB reviews, or on any text.

One process, GPU or CPU:   python train_distributed.py --config launch/presets/quick.yaml
All GPUs of a machine:     accelerate launch --config_file accelerate_config.yaml --num_processes 8 train_distributed.py
Two processes on a CPU:    the same with `--num_processes 2`
Cost of a training:        python train_distributed.py --dry_run

The number of processes changes the speed, not the losses. `--help` lists all settings.
"""

from textgen.cli import train_main

if __name__ == "__main__":
    train_main()
