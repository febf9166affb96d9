"""A conversation with a model: history, templates, and a cache that lives through the turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llama_np.cache import KVCache
from llama_np.chat_template import encode_chat, llama2_prompt, llama3_prompt, shield
from llama_np.config import Config
from llama_np.generate import Token, activation_dtype, stream
from llama_np.model import ModelWeights
from llama_np.prompt_cache import keep_common_prefix
from llama_np.sampling import Sampling
from llama_np.speculate import Draft
from llama_np.tokenizer import Tokenizer

FORMATS = ("auto", "plain", "llama2", "llama3")
LLAMA3_TOKEN = "<|start_header_id|>"
ANSWER_SHARE = 4  # of the context: a fourth of it stays free for an answer


@dataclass
class Chat:
    """A conversation. `messages` are {"role", "content"}; what was computed is not run again.

    format: "auto" takes the checkpoint's own template, or LLaMA-3's format if its control
    tokens exist, else "plain": the messages are simply one text, which the model continues.
    A message's content never becomes a control token, whatever it holds.
    """

    config: Config
    weights: ModelWeights
    tokenizer: Tokenizer
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    seed: int = 0
    format: str = "auto"
    messages: list[dict[str, str]] = field(default_factory=list)
    draft: Draft | None = None  # guesses tokens, see `generate.stream`
    forgotten: int = 0  # messages that fell out of the context in the latest turn
    reused: int = 0  # prompt tokens that the latest turn found in the cache
    cached_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format = {self.format!r}: expected one of {', '.join(FORMATS)}")
        if self.format == "llama3" and LLAMA3_TOKEN not in self.tokenizer.special_tokens:
            raise ValueError(f"format = 'llama3': the vocabulary has no {LLAMA3_TOKEN}")
        self.cache = KVCache(self.config, dtype=activation_dtype(self.weights))

    @property
    def effective_format(self) -> str:
        """What "auto" means for this checkpoint: "template", "llama3" or "plain"."""
        if self.format != "auto":
            return self.format
        if self.tokenizer.chat_template is not None:
            return "template"
        return "llama3" if LLAMA3_TOKEN in self.tokenizer.special_tokens else "plain"

    def answer(self, text: str) -> Iterator[Token]:
        """Say something and stream the model's answer; both join the history.

        Closing the iterator early (or an interrupt) keeps the part that was answered.
        Errors: ChatTemplateError; ValueError when the message alone exceeds the context. The
        history is then as before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting_ids()
        except BaseException:
            self.messages = before
            raise
        return self._stream(ids)

    def regenerate(self) -> Iterator[Token]:
        """Answer the latest message again, with another seed.

        Errors: ValueError when nothing was said yet.
        """
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ValueError("there is nothing to answer again")
        self.seed += 1
        return self._stream(self._fitting_ids())

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _stream(self, ids: list[int]) -> Iterator[Token]:
        self.reused = keep_common_prefix(self.cache, self.cached_ids, ids)
        reply, produced = "", []
        options: dict[str, Any] = {
            "max_new_tokens": self.max_tokens,
            "sampling": self.sampling,
            "seeds": [self.seed],
            "stop_ids": sorted({*self.config.eos_token_id, *self.tokenizer.eos_ids}),
            "tokenizer": self.tokenizer,
            "cache": self.cache,
            "draft": self.draft,
        }
        try:
            for token in stream([ids], self.weights, self.config, **options):
                reply += token.text
                produced += [] if token.id is None else [token.id]
                yield token
        finally:  # an interrupted step may have left half a token in the cache
            known = [*ids, *produced[:-1]] if produced else ids[: self.reused]
            self.cached_ids = known[: self.cache.length]
            self.cache.crop(len(self.cached_ids))
            self.messages.append({"role": "assistant", "content": reply})

    def _fitting_ids(self) -> list[int]:
        """The prompt, after forgetting the oldest turns, as many as leave no room to answer."""
        self.forgotten = 0
        room = self.config.max_position_embeddings
        answer = max(1, min(self.max_tokens, room // ANSWER_SHARE))
        while True:
            ids = self._encode()
            if len(ids) + answer <= room:
                return ids
            oldest = next((i for i, m in enumerate(self.messages) if m["role"] != "system"), 0)
            if oldest >= len(self.messages) - 1:
                if len(ids) < room:  # a long message may leave less
                    return ids
                raise ValueError(f"the message is too long: {len(ids)} tokens, room for {room}")
            end = oldest + 1
            while self.messages[end]["role"] != "user":
                end += 1
            del self.messages[oldest:end]
            self.forgotten += end - oldest

    def _encode(self) -> list[int]:
        tokenizer, kind = self.tokenizer, self.effective_format
        if kind == "template":
            return encode_chat(tokenizer, self.messages)
        if kind == "plain":
            return tokenizer.encode("".join(m["content"] for m in self.messages))
        messages, mark = shield(self.messages, tokenizer.special_tokens)
        text = llama3_prompt(messages, True) if kind == "llama3" else llama2_prompt(messages)
        parts = [p.replace(mark, "") if isinstance(p, str) else p for p in tokenizer.split(text)]
        return tokenizer.encode_parts(parts)
