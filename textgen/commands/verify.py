"""The command `verify`: check every byte of a run's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from textgen.commands.parsing import Parser, fail


def verify_command(argv: Sequence[str]) -> None:
    """Check a checkpoint, or all of a run, and print their content; end with exit code 2 if one is not valid."""
    parser = Parser(prog="textgen verify", description="Check every byte of a checkpoint and print its content.")
    parser.add_argument("checkpoint", help="checkpoint or run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object per checkpoint")
    args = parser.parse_args(list(argv))

    from textgen.errors import TextgenError
    from textgen.runs.checkpoint import checkpoints
    from textgen.training.resume import describe_checkpoint

    invalid = 0
    for directory in [path for _, path in checkpoints(Path(args.checkpoint))] or [Path(args.checkpoint)]:
        try:
            contents = describe_checkpoint(directory)
        except TextgenError as error:
            invalid += 1
            contents = {"checkpoint": str(directory), "valid": False, "problem": str(error)}
        if args.json:
            print(json.dumps(contents))
        elif contents["valid"]:
            print("\n".join(f"{name:16} {value}" for name, value in contents.items()), end="\n\n")
        else:
            print(f"{'checkpoint':16} {directory}\n{'valid':16} False\n{'problem':16} {contents['problem']}\n")
    if invalid:
        fail(f"{invalid} invalid checkpoint{'s' if invalid > 1 else ''} in `{args.checkpoint}`")
