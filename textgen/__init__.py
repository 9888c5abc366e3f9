"""Distributed training of LSTM language models, and sampling from them."""

import os

# GNU OpenMP reads it when torch is loaded. By default a thread that waits spins for milliseconds; on a machine with
# anything else to do both threads then wait for a core. Measured on two cores with the quick preset, in tokens/s, quiet
# and beside one busy process: by default 30,000 and 1,000; with this count 30,000 and 13,000; with
# OMP_WAIT_POLICY=PASSIVE 17,000 and 18,000 (2026-11-23).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
