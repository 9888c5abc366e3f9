"""States that the server keeps: of the beginnings of prompts, and of answers that a client wants to continue."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from textgen.decoding.decoders import PREFILL_WINDOW, DecoderState
from textgen.decoding.reading import ReadState

# Counted for an entry beside its state: its key, and Python's objects.
ENTRY_BYTES = 512

# A connection may hold this share of the kept states, so that it cannot drive out those of all others.
CONNECTION_SHARE = 1 / 8

# Bytes per kept state, on average, beyond which the oldest ones are dropped.
STATE_BYTES = 256 << 10


class PrefixTable:
    """States after whole windows of prompts, so that prompts which begin alike read these windows once.

    A prefix is found by a keyed hash of its tokens, with a key of the process. The least recently used states are
    dropped. One thread may use a table.

    The states are rows of one tensor. As tensors of a few KB, made between the large ones of each window, they would
    leave holes in the heap that nothing fits into: 32 MiB of them, made beside blocks of 1 MiB, took 2.6 GB (glibc
    2.36, 2026-11-29).

    Args:
        max_bytes: of memory; 0 keeps nothing.
        like: a state of the decoder, for which the memory is allocated; None to do this at the first state.

    Raises:
        RuntimeError: there is not so much memory.
    """

    def __init__(self, max_bytes: int, *, like: DecoderState | None = None) -> None:
        self.max_bytes = max_bytes
        self._key = secrets.token_bytes(32)
        self._rows: Tensor | None = None  # (states, sum of the sizes of a state's parts)
        self._places: OrderedDict[bytes, int] = OrderedDict()
        if like is not None and max_bytes:
            self._allocate(like)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        """Memory of the states and their entries."""
        return 0 if self._rows is None else len(self) * row_bytes(self._rows)

    def keys(self, ids: Sequence[int], salt: str) -> list[bytes]:
        """Return the key after each whole window of a prompt that leaves a token to read; none of a table that is off.

        Args:
            ids: all tokens that the model reads.
            salt: of the client: prefixes with other salts are other prefixes.
        """
        if not self.max_bytes:
            return []
        digest = hashlib.blake2b(key=self._key)
        digest.update(hashlib.sha256(salt.encode()).digest())
        keys = []
        for end in range(PREFILL_WINDOW, len(ids), PREFILL_WINDOW):
            digest.update(np.array(ids[end - PREFILL_WINDOW : end], dtype=np.int32).tobytes())
            keys.append(digest.digest())
        return keys

    def find(self, keys: Sequence[bytes], first: int) -> tuple[int, DecoderState] | None:
        """Return the number of windows of the longest known prefix and its state; None if it has at most `first`."""
        for count in range(len(keys), first, -1):
            if (place := self._places.get(keys[count - 1])) is not None:
                assert self._rows is not None
                self._places.move_to_end(keys[count - 1])
                return count, list(torch.split(self._rows[place : place + 1].clone(), self._sizes, 1))
        return None

    def put(self, key: bytes, state: DecoderState) -> None:
        """Keep a state; if there is no room, in place of the one that was not used for the longest time.

        Args:
            key: one of `keys`.
            state: of the decoder, of one row; all states of a table have the same shape.
        """
        rows = self._allocate(state) if self._rows is None else self._rows
        if key in self._places or not len(rows):
            return
        is_full = len(self) == len(rows)
        place = self._places.popitem(last=False)[1] if is_full else len(self)
        rows[place] = torch.cat(state, 1)[0]
        self._places[key] = place

    def _allocate(self, state: DecoderState) -> Tensor:
        row = torch.cat(state, 1)  # (1, sum of sizes)
        self._sizes = [part.shape[1] for part in state]
        self._rows = row.new_empty(self.max_bytes // row_bytes(row), row.shape[1])
        return self._rows


def row_bytes(rows: Tensor) -> int:
    """Return the memory of a row and its entry."""
    return ENTRY_BYTES + rows.shape[1] * rows.element_size()


@dataclass(frozen=True)
class KeptState:
    """A text that a client wants to continue: a prompt and its sample."""

    text: str
    """as the client sent and got it"""
    read: ReadState | None
    """a beginning of it that the model has read; None if it has less than a window"""
    label: str | None = None
    """of the text, for a model with labels"""

    @property
    def num_bytes(self) -> int:
        """Memory of the text, of its tokens as Python's integers, and of the state."""
        text = ENTRY_BYTES + 4 * len(self.text)
        return text if self.read is None else text + 36 * len(self.read.ids) + sum(p.nbytes for p in self.read.state)


@dataclass(frozen=True)
class _Entry:
    id: str
    kept: KeptState
    connection: Hashable
    expires_at: float


class StateTable:
    """Kept states by their ids: 128 random bits, which are valid in this process.

    Args:
        max_states: number of states; 0 keeps none.
        max_seconds: age of a state.
        clock: returns seconds.
    """

    def __init__(self, max_states: int, max_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_states, self._max_seconds, self._clock = max_states, max_seconds, clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the oldest first
        self._of_connection: Counter[Hashable] = Counter()
        self._num_bytes = 0
        self._key = secrets.token_bytes(32)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def max_of_connection(self) -> int:
        """Number of states that a connection may hold."""
        return int(max(self.max_states * CONNECTION_SHARE, 1))

    @property
    def max_bytes(self) -> int:
        """Memory of all states."""
        return self.max_states * STATE_BYTES

    def put(self, kept: KeptState, connection: Hashable) -> str:
        """Keep a state and return its id. The connection's oldest states, then the oldest of all, make room.

        The new state itself is kept in any case.

        Args:
            kept: the state.
            connection: identifies the connection that asked for it.
        """
        self._drop_old()
        entry = _Entry(f"state-{secrets.token_hex(16)}", kept, connection, self._clock() + self._max_seconds)
        self._entries[self._hash(entry.id)] = entry
        self._of_connection[connection] += 1
        self._num_bytes += kept.num_bytes
        if self._of_connection[connection] > self.max_of_connection:
            self._drop(next(key for key, entry in self._entries.items() if entry.connection == connection))
        while len(self) > 1 and (len(self) > self.max_states or self._num_bytes > self.max_bytes):
            self._drop(next(iter(self._entries)))
        return entry.id

    def get(self, state_id: str) -> KeptState | None:
        """Return the state of an id; None if there is none, or none any more.

        An id is found by its keyed hash and compared in constant time, so how long it takes says nothing about ids.
        """
        self._drop_old()
        entry = self._entries.get(self._hash(state_id))
        known = entry is not None and hmac.compare_digest(entry.id.encode(), state_id.encode())
        return entry.kept if entry is not None and known else None

    def _hash(self, state_id: str) -> bytes:
        return hashlib.blake2b(state_id.encode(), key=self._key, digest_size=16).digest()

    def _drop_old(self) -> None:
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).expires_at <= now:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._num_bytes -= entry.kept.num_bytes
        self._of_connection[entry.connection] -= 1
        if not self._of_connection[entry.connection]:
            del self._of_connection[entry.connection]
