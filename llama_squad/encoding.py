"""Chat messages → token ids, labels and offsets, by a tokenizer's own chat template.

Knows tokenizers and templates, and nothing of batches, models or SQuAD.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llama_squad.answers import NO_ANSWER, format_answer
from llama_squad.prompts import Message
from llama_squad.rendering import ChatTemplate, Place, Rendered

IGNORE = -100
"""The label of a token that is not trained."""

Encoded = dict[str, Any]
"""An example: lists of its ``input_ids`` and ``labels``. Of an activated adapter also
``adapter_from``: the index of the first token that it acts on. With filler also ``hidden``: the
first and last-plus-one index of the tokens that no other attends to; and ``chat`` where some
examples are plain chat: whether this one is."""

FILLER = " blah"
"""A word of filler."""

Offsets = list[tuple[int, int]]

_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""What special tokens are to a tokenizer."""


def label_all(example: Encoded) -> Encoded:
    """Return an example with labels on all tokens that can be predicted: all but the first."""
    return {**example, "labels": [IGNORE, *example["input_ids"][1:]]}


def reasoning_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Find a token for reasoning: one whose embedding exists, and that no text is encoded to.

    In order: a reserved special token (Llama 3), the unknown token of a vocabulary with byte
    fallback (Llama 2), a new token on a spare row of the embedding (Qwen), the last special token
    that has no part in chats (SmolLM2 has some for code). None of them makes the embedding grow,
    so the adapter holds that one row and not the whole matrix.

    Raises:
        ValueError: the vocabulary has no room.
    """
    added = sorted(tokenizer.added_tokens_decoder.items())
    for token_id, token in added:
        if re.search(r"reserved|unused", token.content):
            return token_id
    fallback = '"byte_fallback":true' in tokenizer.backend_tokenizer.to_str()
    if tokenizer.unk_token_id is not None and fallback:
        return tokenizer.unk_token_id
    if len(tokenizer) < vocab_size:
        tokenizer.add_tokens(["<|pause|>"], special_tokens=True)
        return tokenizer.added_tokens_encoder["<|pause|>"]
    used = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    used.update(ChatEncoder(tokenizer).encode([turns])[0]["input_ids"])
    template = str(tokenizer.chat_template)  # of tools, too
    for token_id, token in reversed(added):
        if token.special and token_id not in used and token.content not in template:
            return token_id
    raise ValueError(
        "this vocabulary has no special token without a use and its embedding no spare row, so "
        "there is none for reasoning: leave --reasoning_tokens out"
    )


class ChatEncoder:
    """Encode conversations with a tokenizer's own chat template.

    Contents are data: text in them that spells a control token is encoded as plain text. The
    template is rendered once for each sequence of roles, so it cannot act on what a content says.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        reasoning_token: id of the token that stands before the last reply, and
        reasoning_tokens: how many of it do (unsupervised).
        filler: how many words of filler stand before those, which no other token attends to.

    Raises:
        ValueError: the tokenizer has no chat template, or is not a fast one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reasoning_tokens: int = 0,
        reasoning_token: int | None = None,
        filler: int = 0,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer "
                "(tokenizer.json) is needed"
            )
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: "
                "take a chat model, or give one with --chat_template FILE"
            )
        if reasoning_tokens and reasoning_token is None:
            raise ValueError("reasoning tokens need a token of the vocabulary to stand for them")
        self.tokenizer = tokenizer
        tokens = [] if reasoning_token is None else [reasoning_token]
        self.reasoning_ids = tokens * reasoning_tokens
        plain = tokenizer.backend_tokenizer.encode(FILLER * filler, add_special_tokens=False)
        self.filler_ids: list[int] = plain.ids
        self._before_reply = self.filler_ids + self.reasoning_ids
        self._template = ChatTemplate(tokenizer)
        self._control = frozenset(
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if not is_white(token.content)
        )

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        places: Sequence[Place] | None = None,
    ) -> list[Encoded]:
        """Encode conversations that end with the assistant's reply, with labels on that reply.

        Labels are ``IGNORE`` except from the reply's first token through the token that ends the
        turn. Returns one ``{"input_ids": [...], "labels": [...]}`` a conversation; with ``places``,
        where an activated adapter begins to act in each, also "adapter_from".
        """
        rendered = self._render_all(conversations, places)
        encoded: list[Encoded] = []
        for item, (ids, offsets) in zip(rendered, self._tokenize(rendered), strict=True):
            start, end = self._supervised(ids, offsets, item)
            if end < 0:  # a template without an end of turn: the reply must end all the same
                ids, end = [*ids, self._eos()], len(ids) + 1
            labels = [IGNORE] * (start + len(self._before_reply)) + ids[start:end]
            ids = ids[:start] + self._before_reply + ids[start:]
            labels += [IGNORE] * (len(ids) - len(labels))
            encoded.append({"input_ids": ids, "labels": labels})
            if self.filler_ids:
                encoded[-1]["hidden"] = [start, start + len(self.filler_ids)]
            if item.place is not None:
                encoded[-1]["adapter_from"] = _first_from(item.place, offsets[:start])
        return encoded

    def encode_prompts(
        self, conversations: Sequence[Sequence[Message]], final: bool = True
    ) -> list[list[int]]:
        """Encode conversations that end with a user turn, ready for the assistant's reply.

        The ids are those that precede the supervised tokens of the same conversation in ``encode``,
        by construction: a reply is encoded too, and cut off.
        ``final`` is False where a further turn of the prompt follows (no reasoning, no filler).
        """
        return [ids for ids, _ in self._encode_prompts(conversations, None, final)]

    def encode_activated_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        places: Sequence[Place],
        final: bool = True,
    ) -> list[tuple[list[int], int]]:
        """Encode as ``encode_prompts``; with the index of the first token the adapter acts on.

        ``places`` tell where it begins to act in each conversation.
        """
        return [
            (ids, start or 0) for ids, start in self._encode_prompts(conversations, places, final)
        ]

    def _encode_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        places: Sequence[Place] | None,
        final: bool,
    ) -> Iterator[tuple[list[int], int | None]]:
        reply = {"role": "assistant", "content": format_answer(NO_ANSWER)}
        rendered = self._render_all([[*messages, reply] for messages in conversations], places)
        before_reply = self._before_reply if final else []
        for item, (ids, offsets) in zip(rendered, self._tokenize(rendered), strict=True):
            end = self._supervised(ids, offsets, item)[0]
            acts = None if item.place is None else _first_from(item.place, offsets[:end])
            yield ids[:end] + before_reply, acts

    def filler_of(self, prompt: Sequence[int]) -> range:
        """Return which tokens of a prompt, encoded as final, are filler."""
        stop = len(prompt) - len(self.reasoning_ids)
        return range(stop - len(self.filler_ids), stop)

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the chat template ends no turn, and the tokenizer has no eos token")
        return self.tokenizer.eos_token_id

    def _render_all(
        self, conversations: Sequence[Sequence[Message]], places: Sequence[Place] | None
    ) -> list[Rendered]:
        found: Sequence[Place | None] = places or [None] * len(conversations)
        return [
            self._template.render(m, place) for m, place in zip(conversations, found, strict=True)
        ]

    # Tokenising ------------------------------------------------------------------------------

    def _tokenize(self, rendered: Sequence[Rendered]) -> Iterator[tuple[list[int], Offsets]]:
        """Yield the ids and the character offsets of each rendered conversation."""
        batch = self.tokenizer(
            [item.text for item in rendered],
            add_special_tokens=False,  # the template writes them
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        ).encodings
        for encoding, item in zip(batch, rendered, strict=True):
            ids, offsets = encoding.ids, encoding.offsets
            if self._spells_control(ids, offsets, item):
                ids, offsets = self._tokenize_as_data(item)
            yield ids, offsets

    def _spells_control(self, ids: list[int], offsets: Offsets, item: Rendered) -> bool:
        """Tell whether text of a content was taken for a control token."""
        for token_id, (start, end) in zip(ids, offsets, strict=True):
            if token_id in self._control:
                for a, b in item.spans:
                    # a template's own token may swallow spaces of a content: that is no spelling
                    if item.text[max(start, a) : min(end, b)].strip():
                        return True
        return False

    def _tokenize_as_data(self, item: Rendered) -> tuple[list[int], Offsets]:
        """Encode a conversation whose contents spell control tokens, as plain text there.

        Tokenizers cut a text at its control tokens and encode the pieces on their own. Here the
        template's control tokens cut it, and nothing else does.
        """
        ids: list[int] = []
        offsets: Offsets = []
        start = 0
        for a, b, token in [*self._template_controls(item), (len(item.text), len(item.text), None)]:
            piece = item.text[start:a].rstrip() if token and token.lstrip else item.text[start:a]
            encoding = self.plain.encode(piece, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + x, start + y) for x, y in encoding.offsets]
            if token:
                ids.append(self.tokenizer.added_tokens_encoder[token.content])
                offsets.append((a, b))
                if token.rstrip:
                    b += len(item.text[b:]) - len(item.text[b:].lstrip())
            start = b
        return ids, offsets

    def _template_controls(self, item: Rendered) -> list[tuple[int, int, Any]]:
        """Return the control tokens that the template wrote: start, end and the added token."""
        tokens = {
            token.content: token
            for token_id, token in self.tokenizer.added_tokens_decoder.items()
            if token_id in self._control
        }
        longest_first = sorted(tokens, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)))
        edges = [0, *(edge for span in item.spans for edge in span), len(item.text)]
        return [
            (match.start(), match.end(), tokens[match[0]])
            for start, end in zip(edges[::2], edges[1::2], strict=True)
            for match in pattern.finditer(item.text, start, end)
        ]

    @functools.cached_property
    def plain(self) -> Tokenizer:
        """The same tokenizer without its control tokens: it spells them like any other text."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        white = [token for token in content["added_tokens"] if is_white(token["content"])]
        content["added_tokens"] = white
        if isinstance(content["model"]["vocab"], dict):  # else those left would be numbered anew
            content["model"]["vocab"] |= {token["content"]: token["id"] for token in white}
        content["post_processor"] = content["truncation"] = content["padding"] = None
        for part in _parts(content["normalizer"]) + _parts(content["pre_tokenizer"]):
            if part.get("prepend_scheme") == "first":  # a piece is not the text's first
                part["prepend_scheme"] = "never"
        return Tokenizer.from_str(json.dumps(content))

    def _supervised(self, ids: list[int], offsets: Offsets, item: Rendered) -> tuple[int, int]:
        """Return the tokens to train: from the last content's first through the end of the turn.

        The second figure is -1 where nothing in the template ends the turn.
        """
        content_start, content_end = item.spans[-1]
        start = len(ids)
        while start and offsets[start - 1][1] > content_start:
            start -= 1
        if start == len(ids) or content_start == content_end:
            raise ValueError("the conversation ends with an empty reply: there is nothing to train")
        for index in range(start, len(ids)):
            if ids[index] in self._control and offsets[index][0] >= content_end:
                return start, index + 1
        tail = len(item.text.rstrip())
        if tail == content_end:
            return start, -1
        # The end of the turn is spelled in ordinary tokens (a template with foreign markers).
        end = len(ids)
        while offsets[end - 1][0] >= tail:
            end -= 1
        return start, end


def is_white(token: str) -> bool:
    """Tell whether a token holds white space alone: added ones may (Gemma's line ends and runs)."""
    return not token.replace("▁", " ").strip()


def _first_from(place: int, offsets: Offsets) -> int:
    """Return the first token of a prompt that lies wholly from a character on; at most its last.

    The last one predicts the reply's first token: an adapter has to act on that.
    """
    start = len(offsets) - 1
    while start and offsets[start - 1][0] >= place:
        start -= 1
    return start


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a tokenizer's component and, if it is a sequence, its parts."""
    if component is None:
        return []
    return [component, *component.get("normalizers", []), *component.get("pretokenizers", [])]
