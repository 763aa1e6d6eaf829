"""Talk with a model as people do: turn by turn, the reply streaming. The demo's side of decoding.

Replies are greedy and free; ``llama_squad.decoding.generator`` is what evaluates.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import DynamicCache

from llama_squad.activation import ADAPTER_MASK, activation_of, adapter_off, keep_last
from llama_squad.arguments import AppArguments
from llama_squad.decoding.generator import stop_ids
from llama_squad.encoding import ChatEncoder
from llama_squad.prompts import Message, adapter_start, build_messages

FRAME = 0.05
"""Seconds between two updates of a reply on the page: each costs about as much as a token."""


class ChatSession:
    """A model that all visitors share: it is held for one token at a time, so they take turns.

    It keeps nothing between two calls; the conversation is the visitor's.

    Args:
        model: in evaluation mode.
        encoder: the tokenizer's, with the chat template.
        args: the demo's.
        tell: shows the visitor a passing note.
        lock: held while the model works; whoever else uses it holds it, too.
    """

    def __init__(
        self,
        model: Any,
        encoder: ChatEncoder,
        args: AppArguments,
        tell: Callable[[str], object] = print,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.model, self.encoder, self.args = model, encoder, args
        self._tell = tell
        self._stop_ids = stop_ids(model, encoder)
        self._lock = lock or threading.Lock()

    def ask(self, context: str, question: str, base: bool = False) -> Iterator[list[Message]]:
        """Put a question as in training: a new conversation, each user turn in its turn."""
        record = {"context": context, "question": question}
        messages = build_messages(record, self.args.prompt, self.args.system_prompt, answer=False)
        turns = [message["content"] for message in messages if message["role"] == "user"]
        return self.converse([], turns, record, base)

    def converse(
        self,
        messages: list[Message],
        turns: Sequence[str],
        record: Mapping[str, str] | None = None,
        base: bool = False,
    ) -> Iterator[list[Message]]:
        """Add user turns and their replies to a conversation; yield it whenever it has grown.

        Args:
            messages: turns of user and assistant so far, without the system prompt.
            turns: what the user says next, one after the other.
            record: the context and question that the turns put, as in training: the last reply
                comes after the reasoning tokens, if the model has any, and an activated adapter
                acts. In free chat neither is so, and the base model speaks unless
                ``--chat_adapter``.
            base: the base model speaks: its adapter is switched off.
        """
        base = base or (record is None and not self.args.chat_adapter)
        for left, turn in zip(reversed(range(len(turns))), turns, strict=True):
            messages = [*messages, {"role": "user", "content": turn}]
            yield messages
            answered = messages
            final = bool(record) and not left
            prompt = self._encode(messages, None if base else record, final)
            for text in self._reply(*prompt, final, base):
                answered = [*messages, {"role": "assistant", "content": text}]
                yield answered
            messages = answered

    def _reply(self, ids: list[int], acts: int | None, final: bool, base: bool) -> Iterator[str]:
        """Yield the greedy reply to a prompt as it grows; see ``_encode``.

        Raises:
            ValueError: the conversation leaves no room for a reply.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = self.args.max_new_tokens if limit is None else limit - len(ids)
        if room <= 0:
            raise ValueError(
                f"The conversation is {len(ids)} tokens long, and the model reads at most {limit}. "
                "Clear the chat, or shorten the text."
            )
        reply: list[int] = []
        cache, text, shown = None, "", 0.0
        hidden = self.encoder.filler_of(ids) if final else range(0)
        place = None
        if hidden:  # which no token attends to: so the last one matters alone, and that only here
            # A window's own cannot be cropped. Windows are of the tokens in it: wider by the hidden
            # ones than in evaluation, which counts positions.
            cache = DynamicCache()
            _, cache = self._next_token(ids[: hidden.start], cache, acts, base=base)
            place = hidden.stop if ids[hidden.stop :] else hidden.stop - 1
            ids, acts = ids[place:], None if acts is None else 0
        for _ in range(min(room, self.args.max_new_tokens)):
            token, cache = self._next_token(ids, cache, acts, place, base)
            if hidden and place == hidden.stop - 1:
                cache.crop(-1)
            place = None if place is None else place + len(ids)
            if token in self._stop_ids:
                break
            reply.append(token)
            ids, acts = [token], None if acts is None else 0
            text = str(self.encoder.tokenizer.decode(reply, skip_special_tokens=True))
            in_character = text.endswith("\ufffd")
            if not in_character and time.monotonic() - shown > FRAME:
                yield text
                shown = time.monotonic()
        else:
            self._tell(f"The reply was cut after {len(reply)} tokens.")
        yield text.strip()  # as it is fed back in evaluation, too

    def _encode(
        self, messages: list[Message], record: Mapping[str, str] | None, final: bool
    ) -> tuple[list[int], int | None]:
        """Return the prompt and its first token that an activated adapter acts on; None: none."""
        if self.args.system_prompt.strip():
            system = {"role": "system", "content": self.args.system_prompt.strip()}
            messages = [system, *messages]
        activation = activation_of(self.model)
        if activation is None or record is None or (activation.where == "reply" and not final):
            return self.encoder.encode_prompts([messages], final=final)[0], None
        place = adapter_start(messages, record, self.args.prompt, activation.where)
        return self.encoder.encode_activated_prompts([messages], [place], final)[0]

    def _next_token(
        self,
        ids: list[int],
        cache: Any,
        acts: int | None,
        place: int | None = None,
        base: bool = False,
    ) -> tuple[int, Any]:
        """Run tokens, from index ``acts`` on with an activated adapter; None: without.

        They stand at position ``place`` and after it; None: behind those of the cache. ``base``:
        the adapter is switched off.
        """
        more: dict[str, Any] = {}
        keep: int | torch.Tensor = 1
        if place is not None:
            positions = torch.arange(place, place + len(ids), device=self.model.device)
            more["position_ids"] = positions[None]
        if acts is not None:
            adapted = torch.arange(len(ids), device=self.model.device) >= acts
            more[ADAPTER_MASK] = adapted[None]
            keep = keep_last(len(ids), 1, self.model.device)
        with self._lock, torch.inference_mode(), adapter_off(self.model, base):
            output = self.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
                **more,
            )
        return int(output.logits[0, -1].argmax()), output.past_key_values
