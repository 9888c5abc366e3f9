import io
import os
import random
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from tokenizer import Tokenizer, TokenizerError

SCALARS = st.text(st.characters(exclude_categories=["Cs"]))  # all of Unicode, astral planes included
TRAPS = [
    "",
    " ",
    "  a  b  ",
    "\0",
    "a\0b\0",
    "line\r\nline\n\r\n",
    "\t\ttab\t",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581",
    "\u2585 \u2047",
    "<0x41>",
    "</s>",
    "<unk> <s> <pad>",
    "<br /><br />",
    "end.<br /><br />Start <br />",
    "<br\u2581/><br\u2581/>",
    "\u0301 lone \u0308combining",
    "\ufb01 \u00bd \u212b e\u0301 \u00e9 \u00a0 \u3000",
    "\ufeff\ufffe\uffff\ufffd",
    "\U0001f600\U0010ffff\U000e0001",
    "\u200b\u202e\u2028\x85",
]
MIXED = st.lists(st.one_of(SCALARS, st.sampled_from(TRAPS), st.sampled_from(["good ", " film", "\u2581"]))).map("".join)
MANY = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # fmt: skip


@MANY
@given(text=MIXED)
def test_decoding_an_encoded_text_gives_it_back(lossless: Tokenizer, text: str) -> None:
    ids = lossless.encode(text)
    assert lossless.decode(ids) == text
    assert all(0 <= token_id < lossless.vocab_size for token_id in ids)
    assert lossless.eos_id not in ids


@pytest.mark.parametrize("text", TRAPS)
def test_traps_survive(lossless: Tokenizer, text: str) -> None:
    assert lossless.decode(lossless.encode(text)) == text


def test_every_unicode_scalar_survives(lossless: Tokenizer) -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert lossless.decode(lossless.encode(text)) == text


def test_every_imdb_review_survives_and_batches_give_the_same_ids(unigram: Tokenizer, reviews: list[str]) -> None:
    one_thread = unigram.encode_batch(reviews)
    two_threads = unigram.encode_batch(reviews, num_threads=2)
    for review, ids, others in zip(reviews, one_thread, two_threads, strict=True):
        assert unigram.decode(ids) == review
        assert (ids == others).all()
    assert [unigram.encode(review) for review in reviews[::100]] == [ids.tolist() for ids in one_thread[::100]]


def test_batch_encode_equals_encode(lossless: Tokenizer) -> None:
    assert [ids.tolist() for ids in lossless.encode_batch(TRAPS)] == [lossless.encode(text) for text in TRAPS]
    assert lossless.encode_batch([]) == []


def test_paragraph_mark_is_one_token(unigram: Tokenizer, bpe: Tokenizer) -> None:
    for tokenizer in (unigram, bpe):
        (token_id,) = tokenizer.encode("<br /><br />")
        assert tokenizer.encode("good.<br /><br />Bad").count(token_id) == 1


def test_literal_u2581_is_three_byte_tokens(lossless: Tokenizer) -> None:
    assert [lossless.token_bytes(token_id) for token_id in lossless.encode("\u2581")] == [b"\xe2", b"\x96", b"\x81"]


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("ab\udfffc", 2), ("\U0001f600\udc00", 1)])
def test_lone_surrogate_is_refused_with_its_position(lossless: Tokenizer, text: str, position: int) -> None:
    with pytest.raises(TokenizerError, match=rf"^lone surrogate U\+D\w{{3}} at character {position} of the text$"):
        lossless.encode(text)
    with pytest.raises(TokenizerError, match="lone surrogate"):
        lossless.encode_batch(["fine", text])


def test_one_token_ends_and_starts_documents(lossless: Tokenizer) -> None:
    assert lossless.bos_id == lossless.eos_id == 1
    assert lossless.decode([lossless.bos_id, *lossless.encode("so bad"), lossless.eos_id]) == "so bad"


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_unknown_id_is_refused(unigram: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match=rf"^token id {token_id} is not in 0\.\.1999$"):
        unigram.decode([token_id])
    with pytest.raises(TokenizerError):
        unigram.stream().push(token_id)


def _stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


@MANY
@given(text=MIXED)
def test_streamed_text_equals_decoded_ids(lossless: Tokenizer, text: str) -> None:
    pieces = _stream(lossless, lossless.encode(text))
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@MANY
@given(ids=st.lists(st.one_of(st.integers(0, 1999), st.integers(0, 258))))  # low ids: raw bytes, mostly broken UTF-8
def test_streamed_text_equals_decoded_ids_for_any_ids(unigram: Tokenizer, ids: list[int]) -> None:
    assert "".join(_stream(unigram, ids)) == unigram.decode(ids)


def test_stream_holds_back_an_incomplete_character(unigram: Tokenizer) -> None:
    ids = unigram.encode("\U0001f600")
    assert _stream(unigram, ids) == ["", "", "", "\U0001f600", ""]
    stream = unigram.stream()
    assert [stream.push(ids[0]), stream.flush(), stream.flush()] == ["", "\ufffd", ""]
    assert "".join(map(stream.push, ids)) == "\U0001f600"


def test_word_model_says_that_it_is_not_lossless(word: Tokenizer, unigram: Tokenizer) -> None:
    assert unigram.is_lossless
    assert not word.is_lossless
    assert word.decode(word.encode(" the film")) == " the film"
    assert word.decode(word.encode(" the qqxyzzy film")) == " the\ufffd film"


def test_saved_model_is_the_same_and_honours_the_umask(unigram: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"old")
    before = os.umask(0o027)
    try:
        unigram.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]
    for place in (path, tmp_path):  # the file, or its folder
        loaded = Tokenizer.from_file(place)
        assert (loaded.model_proto, loaded.sha256) == (unigram.model_proto, unigram.sha256)


def test_failed_save_leaves_nothing(unigram: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(OSError, match=r"tokenizer\.model"):
        unigram.save(tmp_path / "tokenizer.model")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_bytes_that_are_no_model_are_refused(unigram: Tokenizer, tmp_path: Path) -> None:
    for broken in (b"", b"abc", unigram.model_proto[:-100]):
        with pytest.raises(TokenizerError, match=rf"^not a SentencePiece model: {len(broken)} bytes$"):
            Tokenizer(broken)
    (tmp_path / "bad.model").write_bytes(b"abc")
    with pytest.raises(TokenizerError, match=r"bad\.model`: not a SentencePiece model"):
        Tokenizer.from_file(tmp_path / "bad.model")


@pytest.mark.parametrize(
    "setting",
    [
        {"byte_fallback": False},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"eos_id": -1},
    ],
)
def test_model_that_would_change_text_is_refused(training_texts: list[str], setting: dict[str, Any]) -> None:
    model = io.BytesIO()
    lossless: dict[str, Any] = {
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "max_sentence_length": 100_000,
    }
    SentencePieceTrainer.Train(
        sentence_iterator=iter(training_texts[:20]),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        minloglevel=2,
        **{**lossless, **setting},
    )
    (name,) = setting
    with pytest.raises(TokenizerError, match="has no `</s>`" if name == "eos_id" else f"trained without {name}"):
        Tokenizer(model.getvalue())


def test_importing_tokenizer_imports_no_torch() -> None:
    check = "import sys, tokenizer, tokenizer.train; assert not {'torch', 'textgen', 'pyarrow'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"missing\.model"):
        Tokenizer.from_file(tmp_path / "missing.model")


@MANY
@given(text=MIXED, more=MIXED)
@pytest.mark.parametrize("kind", ["unigram", "bpe", "char", "word"])
def test_no_text_that_follows_changes_settled_tokens(
    request: pytest.FixtureRequest, kind: str, text: str, more: str
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text[: tokenizer.settled(text)])
    assert tokenizer.encode(text + more)[: len(ids)] == ids


@pytest.mark.parametrize("kind", ["unigram", "bpe", "char", "word"])
def test_settled_tokens_stay_wherever_reviews_are_cut(
    request: pytest.FixtureRequest, kind: str, training_texts: list[str]
) -> None:
    """Most of a text is settled: all but its last word, or two of them before `<br />`."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    draw = random.Random(0)
    for text in training_texts[:150]:
        cut = draw.randrange(1, len(text))
        settled = tokenizer.settled(text[:cut])
        ids = tokenizer.encode(text[:settled])
        assert tokenizer.encode(text)[: len(ids)] == ids
        assert len(text[settled:cut].split()) <= 3


def test_a_piece_that_may_go_on_is_not_settled(unigram: Tokenizer, bpe: Tokenizer, char: Tokenizer) -> None:
    assert unigram.settled("I watched this mov") == bpe.settled("I watched this mov") == len("I watched this")
    assert char.settled("I watched this mov") == len("I watched this mo")
    assert unigram.settled("mov") == unigram.settled("") == unigram.settled(" ") == 0
    assert unigram.settled("good.<br /><b") == len("good.")
