"""Several sources in one store: each cleaned and split by its own settings, labels and tokenizer of all of them."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from textgen.commands.parsing import PRESETS, parse_train_config
from textgen.config import DataConfig, SourceConfig, TokenizerConfig, TrainConfig
from textgen.data import store as stores
from textgen.data.labels import label_of
from textgen.data.mixture import open_sources
from textgen.data.store import TokenStore, find_prepared, prepare_store
from textgen.data.texts import read_split
from textgen.diagnosis.inputs import find_data
from textgen.errors import TextgenError
from textgen.settings import build_settings

Row = tuple[str, str | None]


def rows_of(name: str, count: int, *, seed: int = 0) -> list[Row]:
    draw = random.Random(f"{name} {seed}")
    return [(f"{name} number {i} has {draw.choice(['one', 'two', 'many'])} words", None) for i in range(count)]


def write(path: Path, rows: list[Row], *, column: str = "text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def config_of(cache: Path, *sources: dict[str, Any]) -> DataConfig:
    return build_settings(DataConfig, {"cache_dir": str(cache), "sources": list(sources)})


def prepare(cache: Path, *sources: dict[str, Any]) -> TokenStore:
    return prepare_store(config_of(cache, *sources), TokenizerConfig(vocab_size=300, model_type="bpe"), progress=False)


def texts(store: TokenStore, source: str, split: str) -> list[str]:
    its = store.split_by_source(split)[source]
    return [store.tokenizer.decode(its.document(i).tolist()) for i in range(its.num_documents)]


def test_each_source_has_its_own_files_column_and_split(tmp_path: Path) -> None:
    a, b = rows_of("a", 40), rows_of("b", 30)
    first = write(tmp_path / "a.jsonl", a)
    write(tmp_path / "b" / "train.jsonl", b[:20], column="body")
    write(tmp_path / "b" / "test.jsonl", b[20:], column="body")
    lines = tmp_path / "c.txt"
    lines.write_text("".join(f"line {i} of c\n" for i in range(10)))
    store = prepare(
        tmp_path / "cache",
        {"name": "a", "weight": 2, "files": [first], "validation_fraction": 0.2, "validation_blocks": 1},
        {"name": "b", "weight": 1, "files": [str(tmp_path / "b")], "text_column": "body", "validation_fraction": 0},
        {"name": "c", "weight": 1, "files": [str(lines)], "txt_documents": "line"},
    )
    held_out = [text for text, _ in a[16:24]]
    assert texts(store, "a", "validation") == held_out
    assert texts(store, "a", "train") == [text for text, _ in a if text not in held_out]
    assert texts(store, "b", "train") == [text for text, _ in b[:20]]
    assert texts(store, "b", "test") == [text for text, _ in b[20:]]
    assert len(texts(store, "c", "train")) == 9
    assert list(store.split_by_source("validation")) == ["a", "c"]
    for split in ("train", "validation", "test"):
        whole = store.split(split)
        parts = store.split_by_source(split)
        assert sum(part.num_documents for part in parts.values()) == whole.num_documents
        assert sum(part.num_tokens for part in parts.values()) == whole.num_tokens
        for name, part in parts.items():
            assert store.sources[name][split] == {
                "documents": part.num_documents, "tokens": part.num_tokens, "bytes": int(part.num_bytes.sum()),
            }  # fmt: skip
    assert len(list(read_split(store, "train"))) == 32 + 20 + 9


def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shared = rows_of("shared", 10)
    first = write(tmp_path / "a.jsonl", rows_of("a", 20) + shared)
    write(tmp_path / "b" / "train.jsonl", rows_of("b", 10))
    write(tmp_path / "b" / "validation.jsonl", shared[:6])
    store = prepare(
        tmp_path / "cache",
        {"name": "a", "weight": 1, "files": [first], "validation_fraction": 0},
        {"name": "b", "weight": 1, "files": [str(tmp_path / "b")]},
        {"name": "twice", "weight": 1, "files": [first], "validation_fraction": 0},
    )
    assert len(texts(store, "a", "train")) == 24
    assert not set(texts(store, "a", "train")) & {text for text, _ in shared[:6]}
    assert texts(store, "twice", "train") == texts(store, "a", "train")  # two sources may train on one text
    assert any(line.startswith("`a`: ") and line.endswith("dropped in other sources 6") for line in caplog.messages)
    write(tmp_path / "b" / "validation.jsonl", rows_of("a", 20) + shared)
    with pytest.raises(TextgenError, match=r"^source `a`: 1 files.*: other sources hold out all of its 30 documents"):
        prepare(
            tmp_path / "cache",
            {"name": "a", "weight": 1, "files": [first], "validation_fraction": 0},
            {"name": "b", "weight": 1, "files": [str(tmp_path / "b")]},
        )


def test_no_source_trains_on_the_end_of_a_document_that_another_holds_out(tmp_path: Path) -> None:
    """The end of a document that is long in one source is held out; in others it may be whole, or cut elsewhere."""
    book = (" ".join(text for text, _ in rows_of("page", 60)), None)
    a = {"weight": 1, "files": [write(tmp_path / "a.jsonl", [*rows_of("a", 5), book])]}
    b = {"weight": 1, "files": [write(tmp_path / "b.jsonl", [*rows_of("b", 25), book])], "validation_fraction": 0}
    write(tmp_path / "c" / "train.jsonl", rows_of("c", 9))
    write(tmp_path / "c" / "validation.jsonl", [book])
    c = {"weight": 1, "files": [str(tmp_path / "c")]}

    def books(**sources: dict[str, Any]) -> dict[str, list[str]]:
        store = prepare(tmp_path / "cache", *({"name": name} | source for name, source in sources.items()))
        return {name: [t for t in texts(store, name, "train") if t.startswith("page")] for name in sources}

    (start,) = books(a=a)["a"]
    assert len(start) < 0.95 * len(book[0])
    assert books(a=a, b=b) == {"a": [start], "b": []}
    assert books(b=b, twice=b) == {"b": [book[0]], "twice": [book[0]]}
    assert books(a=a, twice=a) == {"a": [start], "twice": [start]}
    assert books(a=a, other=a | {"validation_fraction": 0.3}) == {"a": [], "other": []}
    assert books(a=a, c=c) == {"a": [], "c": []}


def test_labels_of_all_sources_are_one_list(tmp_path: Path) -> None:
    a = [(f"a text {i}", ["pos", None, "neg"][i % 3]) for i in range(30)]
    b = [(f"b text {i}", ["5", "pos"][i % 2]) for i in range(30)]
    files = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", a), ("b", b), ("c", rows_of("c", 9)))]
    store = prepare(
        tmp_path / "cache",
        {"name": "a", "weight": 1, "files": [files[0]], "label_column": "label"},
        {"name": "c", "weight": 1, "files": [files[2]]},
        {"name": "b", "weight": 1, "files": [files[1]], "label_column": "label"},
    )
    assert store.labels == ("5", "neg", "pos")
    wanted = dict(a) | dict(b)
    for split in ("train", "validation"):
        for text in read_split(store, split):
            assert label_of(text) == wanted.get(text)
    assert store.split_by_source("train")["b"].begin_ids is not None


def test_the_store_depends_on_texts_and_not_on_weights(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", rows_of("a", 30)), write(tmp_path / "b.jsonl", rows_of("b", 30))

    def sources(*weights: float, names: str = "ab", files: tuple[str, str] = (first, second)) -> list[dict[str, Any]]:
        parts = zip(names, weights, files, strict=True)
        return [{"name": name, "weight": weight, "files": [file]} for name, weight, file in parts]

    store = prepare(tmp_path / "cache", *sources(1, 2))
    assert prepare(tmp_path / "cache", *sources(5, 2)).directory == store.directory
    config = config_of(tmp_path / "cache", *sources(1, 1))
    found = find_prepared(config, TokenizerConfig(vocab_size=300, model_type="bpe"), open_sources(config))
    assert found is not None
    assert found.directory == store.directory
    others = [prepare(tmp_path / "cache", *sources(1, 2, names="ba"))]
    others.append(prepare(tmp_path / "cache", *sources(1, 2, files=(second, first))))
    assert len({its.training_key for its in [store, *others]}) == 3
    texts_of_both = sorted(texts(store, "a", "train") + texts(store, "b", "train"))
    assert sorted(texts(others[1], "a", "train") + texts(others[1], "b", "train")) == texts_of_both


def test_a_store_that_is_given_has_the_sources_that_are_given(tmp_path: Path) -> None:
    sources = [
        {"name": name, "weight": 1, "files": [write(tmp_path / f"{name}.jsonl", rows_of(name, 30))]} for name in "ab"
    ]
    store = prepare(tmp_path / "cache", *sources)
    (tmp_path / "a.jsonl").unlink()
    given = {"store": str(store.directory), "sources": sources[::-1]}
    assert prepare_store(build_settings(DataConfig, given), TokenizerConfig()).key == store.key
    for wrong, message in (
        ([], "holds `a`, `b`, and `data.sources`, which gives the weights, has none"),
        (sources[:1], "holds `a`, `b`, and `data.sources`, which gives the weights, has `a`"),
    ):
        data = build_settings(DataConfig, given | {"sources": wrong})
        with pytest.raises(TextgenError, match=message):
            prepare_store(data, TokenizerConfig())
        check, found = find_data(TrainConfig(data=data))  # of `textgen doctor`
        assert (check.status, found) == ("fail", None)
        assert message in check.advice


def test_the_tokenizer_is_trained_on_a_part_of_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer stops after some bytes, which the first source may have alone."""
    seen: list[str] = []

    def spy(documents: Any, **options: Any) -> bytes:
        seen.extend(documents)
        return train(seen, **options)

    train = stores.train_tokenizer
    monkeypatch.setattr(stores, "train_tokenizer", spy)
    monkeypatch.setattr(stores, "MAX_TRAINING_BYTES", 4000)
    whole = {"validation_fraction": 0}
    prepare(
        tmp_path / "cache",
        {"name": "a", "weight": 9, "files": [write(tmp_path / "a.jsonl", rows_of("aaa", 300))]},
        {"name": "b", "weight": 1, "files": [write(tmp_path / "b.jsonl", rows_of("bbb", 30))], **whole},
    )
    assert sum(text.startswith("bbb") for text in seen) == 30
    assert 50 < sum(text.startswith("aaa") for text in seen) < 75


def test_an_error_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(TextgenError, match=r"^source `b`: `.*b.jsonl` does not exist$"):
        prepare(
            tmp_path / "cache",
            {"name": "a", "weight": 1, "files": [write(tmp_path / "a.jsonl", rows_of("a", 30))]},
            {"name": "b", "weight": 1, "files": [str(tmp_path / "b.jsonl")]},
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"name": "a", "files": ["x"]}], "`data.sources[0].weight` is missing"),
        ([{"weight": 1, "files": ["x"]}], "`data.sources[0].name` is missing"),
        ([{"name": "a", "weight": 0, "files": ["x"]}], "`data.sources[0].weight` must be a finite number above 0: 0"),
        ([{"name": "a", "weight": 1}], "`data.sources[0].source` is files but `data.sources[0].files` is empty"),
        ([{"name": "a/b", "weight": 1, "files": ["x"]}], "`data.sources[0].name` must be of at most 40 letters"),
        ([{"name": "a", "weight": 1, "source": "memory"}], "`data.sources[0].source` memory is not for one of several"),
        ([{"name": "a", "weight": 1, "files": ["x"]}] * 2, "`data.sources` must have different names: a, a"),
        ([{"name": "a", "weight": 1, "files": ["x"], "store": "y"}], "unknown setting `data.sources[0].store`"),
        (["a"], "`sources` must be mappings with a `name` and a `weight`: a"),
        ("a", "`data.sources` must be a list of mappings with a `name` and a `weight`: a"),
    ],
)
def test_wrong_sources_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        build_settings(DataConfig, {"sources": data}, "data.")
    assert str(refused.value).startswith(message)


def test_settings_of_one_source_beside_several_are_refused() -> None:
    source = SourceConfig(name="a", weight=1, files=("x",))
    for name, value in (("text_column", "body"), ("source", "package"), ("validation_fraction", 0.2)):
        with pytest.raises(ValueError, match=f"`{name}` is a setting of each source if there are `sources`: {value}"):
            DataConfig(sources=(source,), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_goes_with_sources(preset: str, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text("data: {sources: [{name: a, weight: 1, files: [x]}]}")
    config = parse_train_config(["--config", preset, "--config", str(mixed), "--data.train_on", "train"])
    assert [source.train_on for source in config.data.sources] == ["train"]


def test_error_about_the_splits_of_a_preset_says_which_flag_helps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train_config(["--config", "large", "--data.sources", "[{name: a, weight: 1, files: [x]}]"])
    assert capsys.readouterr().err == (
        "error: `data.train_on` is a setting of each source if there are `data.sources`: train+unsupervised "
        "(if a preset set it, add `--data.train_on train`)\n"
    )


@pytest.mark.parametrize("given", ["flag", "file"])
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("weight: x", "`data.sources[1].weight` must be a number: x"),
        ("files: [y]", "`data.sources[1].weight` is missing"),
        ("weight: 1, text_colum: y", "unknown setting `data.sources[1].text_colum`; the nearest is `text_column`"),
        (
            "weight: 1, txt_documents: y",
            "`data.sources[1].txt_documents` must be one of `file`, `line`, `paragraph`: y",
        ),
        ("weight: 1, class_path: imported_by_nobody.X", "unknown setting `data.sources[1].class_path`"),
    ],
)
def test_error_of_the_parser_says_which_source_is_wrong(
    given: str, second: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "imported_by_nobody.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = f"[{{name: a, weight: 1e-1, files: [x]}}, {{name: b, {second}}}]"
    (tmp_path / "mixed.yaml").write_text(f"data: {{sources: {sources}}}")
    with pytest.raises(SystemExit, match=r"^2$"):
        parse_train_config(
            ["--data.sources", sources] if given == "flag" else ["--config", str(tmp_path / "mixed.yaml")]
        )
    assert capsys.readouterr().err == f"error: {message}\n"
