"""Train a SentencePiece model with the settings that make it lossless."""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Literal

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from .tokenizer import SPACE, TokenizerError, to_utf8

ModelType = Literal["unigram", "bpe", "char", "word"]

MAX_TRAINING_BYTES = 100_000_000  # three times IMDB; SentencePiece takes 20 bytes of memory for each of them
MAX_WORD_CHARS = 1_000  # text without spaces is cut: the trainer's lattice grows with the longest word
NUM_THREADS = 2  # a constant: it is stored in the file and changes unigram pieces, so never the number of cores
LINE_BREAK = "<br /><br />"  # IMDB's paragraph mark, one token in unigram and bpe models
# Tab and U+2585 are the trainer's own marks, U+2581 its space; it skips NUL. None can be part of a piece.
RESERVED = f"[\0\t{SPACE}\u2585]"

logger = logging.getLogger(__name__)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 8192, model_type: ModelType = "unigram") -> bytes:
    """Train on texts and return the bytes of the model file.

    The same words, as often, in any order, give the same bytes on any machine. Reading stops once
    `MAX_TRAINING_BYTES` are read, so the iterable may be larger than memory; only word counts are kept.

    Args:
        texts: Documents. Newlines are kept.
        vocab_size: Number of token ids, with `<unk>`, `</s>` and, unless `word`, 256 bytes among them. At most this
            many for `char` (one token per character) and `word` (not lossless).
        model_type: SentencePiece's model.

    Raises:
        TokenizerError: No text, a lone surrogate, or a vocabulary too small or too large for the text.
    """
    if model_type not in ("unigram", "bpe", "char", "word"):
        raise TokenizerError(f"model_type must be `unigram`, `bpe`, `char` or `word`: `{model_type}`")
    has_symbol = model_type in ("unigram", "bpe")
    smallest = 3 + 256 * (model_type != "word") + has_symbol
    where = "(setting `tokenizer.vocab_size`)"  # the size may come from a preset: the user may not know its name
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size {vocab_size} is too small: `{model_type}` needs at least {smallest} {where}")
    lines = _count_words(take_training_texts(texts), breaks=f"{LINE_BREAK}|{RESERVED}" if has_symbol else RESERVED)
    if not lines:
        raise TokenizerError("no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            # Word counts are what the trainer makes of documents anyway. Made here they save it a third of its time
            # (27 s became 18 s for 8,192 pieces of IMDB, one thread), and no long document is left out.
            input_format="tsv",
            max_sentence_length=10 * MAX_WORD_CHARS,  # in bytes; the default would skip words over 4,192
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            num_threads=NUM_THREADS,
            # Lossless. The rest of the characters, one in 10,000, is spelled by bytes.
            byte_fallback=model_type != "word",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            character_coverage=0.9999 if has_symbol else 1.0,
            # The symbol fires only when its spaces are spelled U+2581.
            user_defined_symbols=[LINE_BREAK.replace(" ", SPACE)] if has_symbol else [],
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            # Fewer seeds and EM steps than the defaults (1,000,000 and 2): 8 s, not 18, and 0.4 % more bytes per
            # token on held-out IMDB reviews; two threads make it 5.5 s.
            seed_sentencepiece_size=5 * vocab_size,
            num_sub_iterations=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            needs = f"the characters of the text need {found[1]} {where}"
            raise TokenizerError(f"vocab_size {vocab_size} is too small: {needs}") from None
        raise TokenizerError(f"SentencePiece cannot train: {' '.join(str(error).split())}") from None
    largest = _num_pieces(model.getvalue())
    if has_symbol and largest < vocab_size:
        raise TokenizerError(f"vocab_size {vocab_size} is too large for this text: at most {largest} fit {where}")
    return model.getvalue()


def take_training_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts until `MAX_TRAINING_BYTES` are reached.

    Raises:
        TokenizerError: A text holds a lone surrogate; says which, counted from 1.
    """
    num_bytes = 0
    for number, text in enumerate(texts, start=1):
        try:
            num_bytes += len(to_utf8(text))
        except TokenizerError as error:
            raise TokenizerError(f"text {number}: {error}") from None
        yield text
        if num_bytes >= MAX_TRAINING_BYTES:
            logger.info("tokenizer training stops after %d texts, %d bytes", number, num_bytes)
            return


def _count_words(texts: Iterable[str], *, breaks: str) -> list[str]:
    """Return sorted lines `word TAB count`, where a word holds the space before it."""
    pattern = re.compile(breaks)
    first: Counter[str] = Counter()
    spaced: Counter[str] = Counter()
    for text in texts:
        for part in pattern.split(text):
            start, *words = part.split(" ")
            first[start] += 1
            spaced.update(words)
    del first[""]
    # One by one: of a million words that come once a list would make 293 MB of what is 164.
    counts = chain(first.items(), ((f" {word}", count) for word, count in spaced.items()))
    return sorted(
        f"{word[start : start + MAX_WORD_CHARS]}\t{count}"
        for word, count in counts
        for start in range(0, len(word), MAX_WORD_CHARS)
    )


def _num_pieces(model_proto: bytes) -> int:
    return int(SentencePieceProcessor(model_proto=model_proto).GetPieceSize())
