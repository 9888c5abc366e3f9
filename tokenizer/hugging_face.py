"""A tokenizer as files that Hugging Face's `tokenizers` and `AutoTokenizer` read, with the same ids.

SentencePiece spells a space inside pieces as U+2581. These files spell it as a space: so a U+2581 of the text is in no
piece and is spelled by its bytes, as `Tokenizer.encode` does. Where ids may differ:

- unigram: segmentations of equal or nearly equal probability, such as `...` `.` and `.` `...`. SentencePiece's choice
  depends on how the text before them rounds in float32; `tokenizers` computes in float64.
- unigram: a text that holds the name of a byte, special or control token, such as `<0x41>`, `</s>` or `<s>`, is cut
  after its first character. Ids differ if a piece of the vocabulary spans this cut.
- `tokenizers.Tokenizer` reads `</s>` and `<unk>` in a text as special tokens until `encode_special_tokens` is set to
  true. `AutoTokenizer` sets it, because tokenizer_config.json has `split_special_tokens`.
"""

import json
import re

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from .tokenizer import NORMAL, SPACE, USER_DEFINED, Tokenizer, TokenizerError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")

Pieces = list[tuple[str, float, int]]


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the content of `TOKENIZER_FILES` by name.

    Raises:
        TokenizerError: a word tokenizer, which loses text.
    """
    if not tokenizer.is_lossless:
        raise TokenizerError("a word tokenizer cannot be written for Hugging Face's library: it loses text")
    build = _unigram if tokenizer.model_type == "unigram" else _merging
    fast = build(tokenizer, list(tokenizer.scored_pieces()))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    unk, eos = (fast.id_to_token(token_id) for token_id in (tokenizer.unk_id, tokenizer.eos_id))
    fast.add_special_tokens([unk, eos])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": unk,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return dict(zip(TOKENIZER_FILES, (fast.to_str(), json.dumps(config, indent=2) + "\n"), strict=True))


def _unigram(tokenizer: Tokenizer, pieces: Pieces) -> FastTokenizer:
    likeliest = max(score for _, score, kind in pieces if kind == NORMAL)

    def score_of(piece: str, score: float, kind: int) -> float:
        # SentencePiece ignores the score of a symbol (unigram_model.cc, EncodeOptimized).
        return len(piece.encode()) * likeliest - 0.1 if kind == USER_DEFINED else score

    vocabulary = [(_spell(piece, kind), score_of(piece, score, kind)) for piece, score, kind in pieces]
    fast = FastTokenizer(models.Unigram(vocabulary, unk_id=tokenizer.unk_id, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Split(_names(pieces), "merged_with_previous")
    return fast


def _names(pieces: Pieces) -> Regex:
    """Return the first character of every name of a byte, special or control token.

    `tokenizers` would find these names in a text. After a cut there it finds none.
    """
    names = [name for name, _, kind in pieces if kind not in (NORMAL, USER_DEFINED)]
    others = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if not BYTE_NAME.fullmatch(name)]
    return Regex("|".join(["<(?=0x[0-9A-F]{2}>)", *others]))


def _merging(tokenizer: Tokenizer, pieces: Pieces) -> FastTokenizer:
    """Return a BPE model; without merges, its tokens are characters."""
    names = [_spell(piece, kind) for piece, _, kind in pieces]
    scores = {name: score for name, (_, score, kind) in zip(names, pieces, strict=True) if kind == NORMAL}
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    merges = _merges(scores) if tokenizer.model_type == "bpe" else []
    fast = FastTokenizer(models.BPE(vocabulary, merges, unk_token=names[tokenizer.unk_id], byte_fallback=True))
    symbols = [name for name, (_, _, kind) in zip(names, pieces, strict=True) if kind == USER_DEFINED]
    fast.add_tokens([AddedToken(name, normalized=False) for name in symbols])
    return fast


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of pieces that make a piece, in falling order of its score: so does SentencePiece merge."""
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    pairs = ((piece[:cut], piece[cut:]) for piece in ranked for cut in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in scores and right in scores]


def _spell(piece: str, kind: int) -> str:
    return piece.replace(SPACE, " ") if kind in (NORMAL, USER_DEFINED) else piece
