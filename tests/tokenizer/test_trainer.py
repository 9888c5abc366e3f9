import hashlib
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from tokenizer import Tokenizer, TokenizerError, train_tokenizer, trainer
from tokenizer.trainer import ModelType

TRAIN_AND_HASH = """
import hashlib, json, sys
from tokenizer import train_tokenizer
texts = json.load(open(sys.argv[1]))
for model_type in ("unigram", "bpe", "char", "word"):
    print(hashlib.sha256(train_tokenizer(texts, vocab_size=1000, model_type=model_type)).hexdigest())
"""


def test_same_text_gives_the_same_file_in_another_process_on_one_core(
    training_texts: list[str], tmp_path: Path
) -> None:
    texts = training_texts[:150]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(texts))
    train = [sys.executable, "-c", TRAIN_AND_HASH, str(path)]
    hashes = [
        subprocess.run([*prefix, *train], check=True, capture_output=True, text=True).stdout.split()
        for prefix in (["taskset", "-c", "0"], ["env", "PYTHONHASHSEED=7"])
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 4
    random.Random(0).shuffle(texts)
    assert hashlib.sha256(train_tokenizer(texts, vocab_size=1000)).hexdigest() == hashes[0][0]


def test_vocabulary_has_the_size_asked_for(unigram: Tokenizer, bpe: Tokenizer, word: Tokenizer) -> None:
    assert [tokenizer.vocab_size for tokenizer in (unigram, bpe, word)] == [2000, 2000, 2000]


def test_char_model_has_one_token_for_each_character(char: Tokenizer, training_texts: list[str]) -> None:
    assert char.vocab_size == 258 + len(set("".join(training_texts)) - {"\t", "\0"})
    text = training_texts[0] + "<br /><br />"
    assert len(char.encode(text)) == len(text)


def test_pieces_are_learnt(unigram: Tokenizer, bpe: Tokenizer, reviews: list[str]) -> None:
    held_out = reviews[25::500]
    for tokenizer in (unigram, bpe):
        num_tokens = sum(len(tokenizer.encode(text)) for text in held_out)
        assert sum(len(text.encode()) for text in held_out) / num_tokens > 3.0


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_large_vocabulary_names_the_largest_that_fits(training_texts: list[str], model_type: ModelType) -> None:
    with pytest.raises(
        TokenizerError,
        match=r"^vocab_size 90000 is too large for this text: at most \d+ fit \(setting `tokenizer.vocab_size`\)$",
    ) as error:
        train_tokenizer(training_texts[:30], vocab_size=90_000, model_type=model_type)
    largest = int(str(error.value).split(" fit ")[0].split()[-1])
    assert largest > 1000
    model = train_tokenizer(training_texts[:30], vocab_size=largest, model_type=model_type)
    assert Tokenizer(model).vocab_size == largest
    with pytest.raises(TokenizerError, match=f"at most {largest} fit"):
        train_tokenizer(training_texts[:30], vocab_size=largest + 1, model_type=model_type)


def test_too_small_vocabulary_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"^vocab_size 100 is too small: `unigram` needs at least 260 \(setting"):
        train_tokenizer(["some text"], vocab_size=100)
    with pytest.raises(TokenizerError, match=r"^vocab_size 260 is too small: the characters of the text need") as error:
        train_tokenizer(["some text"], vocab_size=260)
    least = int(str(error.value).split(" need ")[1].split()[0])
    assert Tokenizer(train_tokenizer(["some text"], vocab_size=least)).vocab_size == least


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char", "word"])
@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["\0", "\t\u2581", "\u2585"]])
def test_no_text_is_refused(texts: list[str], model_type: ModelType) -> None:
    with pytest.raises(TokenizerError, match=r"^no text to train a tokenizer on$"):
        train_tokenizer(texts, model_type=model_type)


def test_lone_surrogate_in_training_text_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"^text 2: lone surrogate U\+D800 at character 3 of the text$"):
        train_tokenizer(["fine", "bad\ud800"])


@pytest.mark.parametrize("model_type", ["unigram", "bpe", "char"])
def test_odd_training_text_neither_breaks_nor_silences_a_document(model_type: ModelType) -> None:
    odd = "\0zebra\r\nzebra\u2581zebra\tzebra\u2585zebra\n\nzebra\n " + "\U0001f600" * 5000 + "<br /><br />"
    tokenizer = Tokenizer(train_tokenizer([odd], vocab_size=270, model_type=model_type))
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
    assert len(tokenizer.encode("zebra\n")) <= 6  # no character fell back to bytes
    assert len(tokenizer.encode("\U0001f600")) == 1


def test_long_document_is_not_skipped() -> None:
    tokenizer = Tokenizer(train_tokenizer(["zebra " * 100_000], vocab_size=270, model_type="bpe"))
    assert len(tokenizer.encode(" zebra")) == 1


def test_reading_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "MAX_TRAINING_BYTES", 10)
    texts = iter(["sixchr", "\u00e9\u00e9", "unread"])
    train_tokenizer(texts, model_type="char")
    assert next(texts) == "unread"


def test_words_that_come_once_are_counted_in_200_bytes_each() -> None:
    draw = random.Random(0)
    text = " ".join(f"{draw.getrandbits(36):x}" for _ in range(50_000))
    tracemalloc.start()
    try:
        lines = trainer._count_words([text], breaks=trainer.RESERVED)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(lines) > 49_900
    assert peak < 200 * len(lines)


def test_unknown_model_type_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"^model_type must be"):
        train_tokenizer(["text"], model_type="wordpiece")  # type: ignore[arg-type]
