"""Lossless SentencePiece tokenizers: training, encoding, decoding, streaming. Knows neither torch nor textgen."""

from .tokenizer import MODEL_NAME, StreamDecoder, Tokenizer, TokenizerError
from .trainer import train_tokenizer

__all__ = ["MODEL_NAME", "StreamDecoder", "Tokenizer", "TokenizerError", "train_tokenizer"]
