"""What a tokenizer's tokens spell, and in which Unicode form it reads a text. No model."""

import json
from typing import get_args

from tokenizers import decoders, normalizers
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_squad.decoding.boundaries import Form
from llama_squad.encoding import is_white


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the bytes that each token stands for inside a text, without control tokens.

    Of added tokens those of white space alone are text: Gemma's line ends and runs of spaces.

    Raises:
        ValueError: neither a byte-level nor a SentencePiece vocabulary.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    kinds = {part["type"] for part in _components(decoder)}
    added = tokenizer.added_tokens_decoder
    white = {
        i: _sentencepiece_bytes(token.content)
        for i, token in added.items()
        if is_white(token.content) and not token.special
    }
    vocabulary = {i: token for token, i in tokenizer.get_vocab().items() if i not in added}
    if "ByteLevel" in kinds:
        table = {char: byte for byte, char in bytes_to_unicode().items()}
        spells = frozenset(table).issuperset
        return white | {
            i: bytes(map(table.__getitem__, token))
            for i, token in vocabulary.items()
            if spells(token)
        }
    if kinds & {"Replace", "Metaspace"}:
        return white | {i: _sentencepiece_bytes(token) for i, token in vocabulary.items()}
    raise ValueError(
        f"span decoding knows byte-level and SentencePiece vocabularies, not {sorted(kinds)}: "
        "use --decoding free"
    )


def unicode_form(tokenizer: PreTrainedTokenizerBase) -> Form | None:
    """Return the Unicode form that a tokenizer brings texts into (Qwen: NFC), if any."""
    kinds = {part["type"] for part in _components(tokenizer.backend_tokenizer.normalizer)}
    return next((form for form in get_args(Form) if form in kinds), None)


def _components(part: decoders.Decoder | normalizers.Normalizer | None) -> list[dict]:
    """Return what a decoder or a normalizer is made of, as tokenizer.json has it."""
    if part is None:
        return []
    component = json.loads(part.__getstate__())  # all there is to read a sequence's parts by
    return [component, *component.get("decoders", []), *component.get("normalizers", [])]


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
