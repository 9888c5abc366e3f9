"""Processes, devices, precision and signals: checks that you got the processes and devices you asked for.

- `launch`: join the other processes; choose device and precision
- `world`: the processes and machines that launchers and Slurm promise
- `process`: the state of a process that a training changes
- `signals`: signals that stop a training; launcher and sibling processes
"""
