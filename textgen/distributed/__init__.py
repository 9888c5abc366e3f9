"""What launchers promised against what was got: processes, devices, precision, signals.

- `launch`: join the other processes; choose device and precision
- `world`: the world that launchers and Slurm promise
- `signals`: signals, launchers, sibling processes
"""
