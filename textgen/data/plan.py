"""Which documents of a corpus are kept, on disk: one process decides it, and others read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from textgen.data.corpus import CleanCorpus, Corpus, cut_documents
from textgen.errors import TextgenError
from textgen.files import parse_json, write_atomic
from textgen.runs.tensors import read_header, read_tensors, serialize


def save_plan(path: Path, clean: CleanCorpus) -> None:
    """Write which documents of a corpus of one source are kept: `PATH.json`, and masks and labels beside it."""
    arrays: dict[str, NDArray[Any]] = {
        f"{split}.{i}": mask for split, its in clean._parts.items() for i, (_, mask) in enumerate(its)
    }
    arrays |= {f"labels.{split}": labels for split, labels in clean.labels.items()}
    record = {
        "description": clean.description,
        "counts": dict(clean.counts),
        "digests": dict(clean.digests),
        "normalization": clean._normalization,
        "parts": {split: [name for name, _ in parts] for split, parts in clean._parts.items()},
        "label_names": list(clean.label_names),
        "cut_places": list(clean.cut_places.items()),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    write_atomic(path.with_name(f"{path.name}.safetensors"), serialize(tensors))
    write_atomic(path.with_name(f"{path.name}.json"), json.dumps(record))


def read_plan(path: Path, corpus: Corpus) -> CleanCorpus | None:
    """Return what `save_plan` has written of a corpus; None if it is not there, or damaged."""
    try:
        record = parse_json(path.with_name(f"{path.name}.json").read_bytes())
        tensors_path = path.with_name(f"{path.name}.safetensors")
        shapes = {name: shape for name, (_, shape) in read_header(tensors_path).items()}
        arrays = {n: t.numpy() for n, t in read_tensors(tensors_path, shapes, dtypes=("BOOL", "I32")).items()}
        cut_places = dict(record["cut_places"])
        parts = {
            split: [(name, arrays[f"{split}.{i}"]) for i, name in enumerate(names)]
            for split, names in record["parts"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, TextgenError):
        return None
    return CleanCorpus(
        description=record["description"],
        counts=record["counts"],
        digests=record["digests"],
        _corpus=cut_documents(corpus, cut_places) if cut_places else corpus,
        _parts=parts,
        _normalization=record["normalization"],
        label_names=tuple(record["label_names"]),
        labels={split: arrays[f"labels.{split}"] for split in record["parts"] if f"labels.{split}" in arrays},
        cut_places=cut_places,
    )


def remove_plan(path: Path) -> None:
    """Remove what `save_plan` has written, if it is there."""
    for ending in (".json", ".safetensors"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
