"""Files: found, and given to their splits, as promised."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.data.files import write_jsonl, write_parquet
from textgen.config import DataConfig
from textgen.data.documents import read_documents
from textgen.data.sources import list_files
from textgen.errors import TextgenError


def read(*paths: Path | str, **settings: Any) -> list[str]:
    return list(read_documents([str(path) for path in paths], DataConfig(**settings)))


def splits_of(*paths: Path) -> dict[str, list[str]]:
    """Return the documents of each split that the files under `paths` belong to."""
    found: dict[str, list[str]] = {}
    for path, split in list_files([str(path) for path in paths]).items():
        found.setdefault(split, []).extend(read(path))
    return found


def refusal(*paths: Path | str, **settings: Any) -> str:
    """Return the message that reading is refused with: always one line."""
    with pytest.raises(TextgenError) as caught:
        read(*paths, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Finding files


def test_path_parts_name_splits(folder: Path) -> None:
    names = {
        "train": ["a", "devices", "testimonials", "latest", "valley", "Test Pilot", "Dev Diary", "Validated claims",
                  "test_of_time", "The last flight-test", "trainspotting", "The dev", "validity-1"],
        "validation": ["valid", "Validation-00", "val_1", "dev", "dev-v2.0", "TinyStoriesV2-GPT4-valid",
                       "validation_matched", "c4-validation.00000-of-00008"],
        "test": ["test", "test-00000-of-00001", "tests", "test2", "imdb_test", "wiki.test", "test.en", "test (1)",
                 "test-00000-of-00001-4a8d9cd6e5f2b0c1", "test_data"],
        "unsupervised": ["unsup", "unsupervised-00000-of-00001"],
    }  # fmt: skip
    for split, stems in names.items():
        for stem in stems:
            write_jsonl(folder / f"{stem}.jsonl", [f"{split} {stem}"])
            write_jsonl(folder / stem / "part.jsonl", [f"{split} {stem} part"])
    found = splits_of(folder)
    assert set(found) == set(names)
    for split, stems in names.items():
        assert len(found[split]) == 2 * len(stems)
        assert all(text.startswith(split) for text in found[split])


def test_a_given_folder_names_its_split_but_the_folders_above_do_not(folder: Path) -> None:
    part = write_jsonl(folder / "test" / "part.jsonl", ["a"])
    write_jsonl(folder / "test" / "sub" / "b.jsonl", ["b"])
    other = write_jsonl(folder / "t.jsonl", ["c"])
    assert splits_of(part, part.parent / "sub") == {"train": ["a", "b"]}
    assert splits_of(part.parent, other) == {"test": ["a", "b"], "train": ["c"]}
    assert splits_of(part.parent / "*.jsonl", other) == {"test": ["a"], "train": ["c"]}


def test_an_acl_imdb_tree_is_read_in_the_order_of_its_ids(folder: Path) -> None:
    tree = folder / "aclImdb"
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            (tree / split / label).mkdir(parents=True)
            for index in (10, 9, 0):
                (tree / split / label / f"{index}_7.txt").write_text(f"{split} {label} {index}")
        (tree / split / "urls_pos.txt").write_text("http://...")
        (tree / split / "labeledBow.feat").write_text("9 0:9")
    (tree / "train" / "unsup").mkdir()
    (tree / "train" / "unsup" / "0_0.txt").write_text("unsup 0")
    for name in ("imdb.vocab", "imdbEr.txt", "README"):
        (tree / name).write_text("the")
    assert splits_of(tree) == {
        "train": [f"train {label} {index}" for label in ("neg", "pos") for index in (0, 9, 10)],
        "unsupervised": ["unsup 0"],
        "test": [f"test {label} {index}" for label in ("neg", "pos") for index in (0, 9, 10)],
    }
    assert set(splits_of(tree / "train", tree / "test")) == {"train", "unsupervised", "test"}


def test_files_folders_and_globs_mix_and_no_file_is_read_twice(folder: Path) -> None:
    write_jsonl(folder / "a" / "1.jsonl", ["1"])
    write_jsonl(folder / "a" / "10.json", ["10"])
    (folder / "a" / "2.csv").write_text('text\n"2"\n')
    (folder / "a" / "notes.md").write_text("no")
    (folder / "a" / ".hidden.txt").write_text("no")
    (folder / "b.tsv").write_text("id\ttext\n1\tthree\n")
    write_parquet(folder / "c.parquet", {"id": [1], "text": ["four"]})
    assert read(folder / "a", folder / "*.tsv", folder / "c.parquet", folder / "a" / "1.jsonl") == [
        "1", "2", "10", "three", "four",
    ]  # fmt: skip


def test_paths_that_hold_nothing_are_refused(folder: Path) -> None:
    (folder / "a.docx").write_text("a")
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n")
    assert refusal(folder / "no.txt") == f"`{folder}/no.txt` does not exist"
    assert refusal(folder / "*.csv") == f"`{folder}/*.csv` matches no file"
    assert refusal(folder / "empty.txt") == f"`{folder}/empty.txt` is empty"
    assert refusal(folder / "blank.txt") == f"no documents in `{folder}/blank.txt`"
    wanted = (
        "`.txt`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`, and texts compressed as "
        "`.gz`, `.zst`, `.xz`, `.bz2`; a plain text needs a name in `.txt`"
    )
    assert refusal(folder / "a.docx") == f"`{folder}/a.docx` is not one of {wanted}"
    for address in ("s3://bucket/a.txt", "s3://bucket/*.txt"):
        with pytest.raises(TextgenError, match=f"`{re.escape(address)}` is an address: texts are read from a disk"):
            list_files([address])
    (folder / "sub").mkdir()
    assert refusal(folder / "sub") == f"`{folder}/sub` holds no file of {wanted}"


def listed(*paths: Path, rules: int = 2) -> list[str]:
    return [os.path.basename(path) for path in list_files([str(path) for path in paths], rules=rules)]


def test_compressed_files_are_found_in_folders_and_globs_and_by_name(folder: Path) -> None:
    names = ["a.txt.gz", "b.csv.zst", "c.tsv.xz", "d.jsonl.bz2", "e.json.GZ", "F.JSONL", "G.TXT.GZ"]
    for name in names:
        (folder / name).write_bytes(b"x")
    assert sorted(listed(folder)) == sorted(listed(folder / "*")) == sorted(names)
    assert listed(*(folder / name for name in names)) == names
    assert listed(folder, rules=1) == ["F.JSONL"]
    wanted = "`.parquet`; `--data.reading_rules 2` reads compressed files"
    assert refusal(folder / "a.txt.gz", reading_rules=1).endswith(wanted)
    for name in ("a.gz", "b.parquet.gz", "c.docx.gz"):
        (folder / name).write_bytes(b"x")
        assert refusal(folder / name).startswith(f"`{folder}/{name}` is not one of `.txt`")


def test_files_that_are_not_taken_are_counted_in_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / ".git").mkdir()
    for name in ("a.txt", "b.pdf", "c.PDF", "d.docx", "e.parquet.gz", "README", ".hidden.txt", ".git/x.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / "linked").symlink_to(folder.parent)
    with caplog.at_level(logging.INFO, logger="textgen"):
        assert listed(folder) == ["a.txt"]
        assert listed(folder / "a.txt") == ["a.txt"]
    (message,) = caplog.messages
    assert message.startswith(f"not read in `{folder}`: ")
    counts = "2 hidden, 2 .pdf, 2 not a plain file, 1 linked folders, 1 .docx, 1 .parquet.gz, 1 without ending"
    assert sorted(message.split(": ")[1].split(", ")) == sorted(counts.split(", "))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tgz", "a.tar.gz", "a.TAR.ZST", "a.7z", "a.rar", "a.txt.zip"])
def test_archives_are_refused_by_name_and_named_in_folders(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / name).write_bytes(b"x")
    assert refusal(folder / name) == f"`{folder}/{name}` is an archive: unpack it, and give the folder of its files"
    assert refusal(folder).endswith(f"; it holds the archive `{folder}/{name}`: unpack it")
    assert refusal(folder / "*").endswith(f"; it holds the archive `{folder}/{name}`: unpack it")
    (folder / "b.txt").write_text("b")
    assert listed(folder) == ["b.txt"]
    assert caplog.messages == [f"NOT READ: `{folder}/{name}` is an archive; unpack it to read its files"]


def test_a_folder_without_a_text_says_what_it_holds(folder: Path) -> None:
    (folder / "a.docx").write_bytes(b"x")
    assert refusal(folder).endswith("`.txt`; it holds 1 .docx")


def test_brackets_in_the_name_of_a_folder_are_not_part_of_a_glob(folder: Path) -> None:
    for name in ("data [2024]/test/a1.txt", "data [2024]/b*.txt", "data 2/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    given = f"{folder}/data [2024]"
    assert list_files([f"{given}/*.txt"]) == {f"{given}/b*.txt": "train"}
    assert list_files([f"{given}/**/[a-z]?.txt"]) == {f"{given}/test/a1.txt": "test", f"{given}/b*.txt": "train"}
    assert list_files([f"{folder}/data [0-9]/*.txt"]) == {f"{folder}/data 2/c.txt": "train"}
    assert refusal(f"{given}/*.csv") == f"`{given}/*.csv` matches no file"


def test_the_name_nearest_to_the_file_decides_its_split(folder: Path) -> None:
    for name in ("dev/train/a.txt", "dev/b.txt", "train/unsup/c.txt", "test.csv/part-00000.csv", "test/train 1.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    found = {os.path.relpath(path, folder): split for path, split in list_files([str(folder)]).items()}
    assert found == {
        "dev/train/a.txt": "train", "dev/b.txt": "validation", "train/unsup/c.txt": "unsupervised",
        "test.csv/part-00000.csv": "test", "test/train 1.txt": "train",
    }  # fmt: skip


def test_rules_1_take_any_name_that_begins_with_a_split(folder: Path) -> None:
    for name in ("Test Pilot.txt", "Dev Diary.txt", "Validated claims.txt", "imdb_test.txt", "unsuper.txt"):
        (folder / name).write_text("x")
    assert list(list_files([str(folder)], rules=1).values()) == [
        "validation", "test", "validation", "train", "unsupervised",
    ]  # fmt: skip
    assert set(list_files([str(folder)]).values()) == {"train", "test"}


def test_a_pipe_is_refused_with_what_to_do(folder: Path) -> None:
    os.mkfifo(folder / "a.txt")
    assert refusal(folder / "a.txt").startswith(f"`{folder}/a.txt` is a pipe, and texts are read more than once: write")
    code = (
        "import sys; from textgen.data.sources import list_files\n"
        "try: list_files(sys.argv[1:])\nexcept ValueError as error: print(error)"
    )
    command = f"{sys.executable} -c '{code}' <(echo text) /dev/null"
    output = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert "is a pipe, and texts are read more than once" in output
    assert refusal("/dev/null").startswith("`/dev/null` is a device or socket, and texts are read more than once")


# Saved datasets


def save_dataset(folder: Path, texts: Sequence[str], column: str = "text", shards: int = 1) -> Path:
    from datasets import Dataset

    Dataset.from_dict({column: list(texts), "id": list(range(len(texts)))}).save_to_disk(folder, num_shards=shards)
    return folder


def test_a_saved_dataset_is_read_in_the_order_of_its_shards(folder: Path) -> None:
    texts = [f"text {index}" for index in range(23)]
    saved = save_dataset(folder / "saved", texts, shards=11)
    (saved / "cache-0123.arrow").write_bytes((saved / "data-00000-of-00011.arrow").read_bytes())
    assert read(saved) == texts
    assert read(saved / "data-00010-of-00011.arrow") == texts[-2:]
    assert "has no column `review`; it has `text`, `id`" in refusal(saved, text_column="review")


def test_the_splits_of_a_saved_dataset_dict_are_its_folders(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    names = {"train": ["a", "b"], "validation": ["c"], "test": ["d"], "unsupervised": ["e"]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in names.items()}).save_to_disk(folder / "x")
    assert splits_of(folder / "x") == names


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "link.arrow", "gone.arrow", "sub", "", "a.txt", 5])
def test_a_saved_dataset_cannot_name_files_outside_its_folder(folder: Path, name: str | int) -> None:
    saved = save_dataset(folder / "saved", ["a"])
    shutil.copy(saved / "data-00000-of-00001.arrow", folder / "secret.arrow")
    (saved / "link.arrow").symlink_to(folder / "secret.arrow")
    (saved / "sub").mkdir()
    (saved / "a.txt").write_text("a")
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    wanted = f"`{saved}/state.json` names `{name}`, which is not a plain .arrow file of its folder"
    assert refusal(saved) == refusal(saved.parent) == wanted


@pytest.mark.parametrize(
    "state", ["{", "[]", "{}", '{"_data_files": 1}', '{"_data_files": ["a"]}', "[" * 10**5, '{"_data_files": [{}]}']
)
def test_a_damaged_state_of_a_saved_dataset_is_refused(folder: Path, state: str) -> None:
    saved = save_dataset(folder / "saved", ["a"])
    (saved / "state.json").write_text(state)
    assert refusal(saved).startswith(f"`{saved}/state.json` is not the state of a saved dataset: ")
    (saved / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}')
    assert "names rows by an index" in refusal(saved)


def test_a_damaged_shard_of_a_saved_dataset_is_refused(folder: Path) -> None:
    shard = save_dataset(folder / "saved", ["a" * 1000]) / "data-00000-of-00001.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-900])
    assert refusal(folder / "saved").startswith(f"`{shard}` is cut short: it does not end as a stream of Arrow")
    shard.write_bytes(whole[:8] + bytes(100) + whole[108:])
    assert refusal(folder / "saved").startswith(f"`{shard}` ")


def test_folders_named_by_digits_of_other_scripts_are_read_in_order(folder: Path) -> None:
    for name in ("\u0663", "\u096a2", "a", "10", "9", "\u00b3"):
        (folder / name).mkdir()
        (folder / name / "x.txt").write_text(name)
    assert read(folder) == ["9", "10", "a", "\u00b3", "\u0663", "\u096a2"]
