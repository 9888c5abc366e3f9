"""`python -m textgen`, and `accelerate launch --module textgen`."""

from textgen.cli import main

main()
