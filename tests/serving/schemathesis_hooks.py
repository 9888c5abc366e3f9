"""What a schema cannot say of a request: comparisons of fields. Loaded by schemathesis, see test_serve_hostile.py."""

from __future__ import annotations

from typing import Any

import schemathesis

MAX_SAMPLES = 60  # `--max_waiting` of the server under test


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """Return whether fields of a completion go together; all else, right or wrong, passes."""
    if not isinstance(body, dict):
        return True
    n, best_of, prompt = body.get("n"), body.get("best_of"), body.get("prompt")
    n = n if isinstance(n, int) else 1
    best_of = best_of if isinstance(best_of, int) else n
    count = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return best_of >= n and not (best_of > n and body.get("stream") is True) and count * best_of <= MAX_SAMPLES
