"""The files for Hugging Face's library give the ids of the tokenizer itself."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer as FastTokenizer

from tests.tokenizer.test_tokenizer import MANY, MIXED, TRAPS
from tokenizer import Tokenizer, TokenizerError
from tokenizer.hugging_face import TOKENIZER_FILES, hugging_face_files


def fast_of(tokenizer: Tokenizer) -> FastTokenizer:
    fast = FastTokenizer.from_str(hugging_face_files(tokenizer)["tokenizer.json"])
    fast.encode_special_tokens = True  # as `split_special_tokens` of tokenizer_config.json
    return fast


@pytest.fixture(scope="session")
def fasts(unigram: Tokenizer, bpe: Tokenizer, char: Tokenizer) -> dict[str, FastTokenizer]:
    return {tokenizer.model_type: fast_of(tokenizer) for tokenizer in (unigram, bpe, char)}


def same(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> bool:
    """Return whether ids are equal; those of a unigram model may be of another segmentation of the same probability."""
    if ours == theirs or tokenizer.model_type != "unigram":
        return ours == theirs
    scores = [score for _, score, _ in tokenizer.scored_pieces()]
    one, other = (sum(scores[token] for token in ids) for ids in (ours, theirs))
    return tokenizer.decode(theirs) == tokenizer.decode(ours) and abs(one - other) <= 4 * 2**-24 * abs(one)


@MANY
@given(text=st.one_of(MIXED, st.text(".!*m '<>/s0x41brunk\u2581", max_size=60)))
def test_any_text_has_the_same_ids(lossless: Tokenizer, fasts: dict[str, FastTokenizer], text: str) -> None:
    fast, ours = fasts[lossless.model_type], lossless.encode(text)
    assert same(lossless, ours, fast.encode(text).ids)
    assert fast.decode(ours) == text


@pytest.mark.parametrize("text", TRAPS)
def test_traps_have_the_same_ids(lossless: Tokenizer, fasts: dict[str, FastTokenizer], text: str) -> None:
    assert fasts[lossless.model_type].encode(text).ids == lossless.encode(text)


def test_reviews_have_the_same_ids_but_for_ties(
    lossless: Tokenizer, fasts: dict[str, FastTokenizer], reviews: list[str]
) -> None:
    texts = reviews[1::20]
    encoded = [encoding.ids for encoding in fasts[lossless.model_type].encode_batch(texts)]
    different = [
        (ours, theirs) for ours, theirs in zip(map(lossless.encode, texts), encoded, strict=True) if ours != theirs
    ]
    assert all(same(lossless, ours, theirs) for ours, theirs in different)
    assert len(different) <= 0.02 * len(texts)


def test_special_tokens_have_their_ids_and_no_text(unigram: Tokenizer, fasts: dict[str, FastTokenizer]) -> None:
    fast = fasts["unigram"]
    assert (fast.token_to_id("</s>"), fast.token_to_id("<unk>")) == (unigram.eos_id, unigram.unk_id)
    assert fast.get_vocab_size() == unigram.vocab_size
    assert fast.decode([*unigram.encode("a film"), unigram.eos_id]) == "a film"
    config = json.loads(hugging_face_files(unigram)[TOKENIZER_FILES[1]])
    assert (config["bos_token"], config["eos_token"], config["split_special_tokens"]) == ("</s>", "</s>", True)


def test_control_tokens_are_not_found_in_a_text(training_texts: list[str]) -> None:
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(training_texts[:100]),
        model_writer=model,
        vocab_size=600,
        minloglevel=2,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentence_length=100_000,
        control_symbols=["<a-b>", "[x|y]"],
    )
    tokenizer = Tokenizer(model.getvalue())
    fast = fast_of(tokenizer)
    for text in ("a <s>film</s> of <a-b> and [x|y], <unk> <0x41>", "<s>", "[x|y]", "<s", "[x", "xly"):
        assert fast.encode(text).ids == tokenizer.encode(text), text


def test_a_word_tokenizer_is_refused(word: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="a word tokenizer cannot be written"):
        hugging_face_files(word)
