"""Showing text while it is generated: what `generate(streamer=...)` takes.

A streamer has put(tokens), called with the prompt (1, T) and then with every token (1,), and
end(). Text appears word by word, because a word can change until it is complete.
"""

from __future__ import annotations

from queue import Queue
from typing import Any, Self

import numpy as np


class TextStreamer:
    """Print the text of one row as it is generated; decode keywords go to the tokenizer."""

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._tokens: list[int] = []
        self._shown = 0
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Take tokens: (T,) or (1, T). Errors: ValueError for more than one row."""
        tokens = np.asarray(value)
        if tokens.ndim > 1 and len(tokens) > 1:
            raise ValueError("TextStreamer only supports batch size 1")
        prompt, self._prompt_is_next = self._prompt_is_next, False
        if prompt and self.skip_prompt:
            return
        self._tokens += [int(token) for token in tokens.reshape(-1)]
        text = self.tokenizer.decode(self._tokens, **self.decode_kwargs)
        if text.endswith("\n"):
            self.on_finalized_text(text[self._shown :])
            self._tokens, self._shown = [], 0
        else:
            ready = len(text) if text and is_ideograph(text[-1]) else text.rfind(" ") + 1
            self.on_finalized_text(text[self._shown : ready])
            self._shown = max(self._shown, ready)

    def end(self) -> None:
        """Show the rest."""
        text = self.tokenizer.decode(self._tokens, **self.decode_kwargs) if self._tokens else ""
        rest, self._tokens, self._shown = text[self._shown :], [], 0
        self._prompt_is_next = True
        self.on_finalized_text(rest, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """What to do with text that will not change any more, "" at times; override it."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Iterate over the text, while generate() runs in another thread.

    Pieces wait in `text_queue`, `stop_signal` ends them; after `timeout` seconds without one the
    iteration ends in queue.Empty.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: Queue[Any] = Queue()
        self.stop_signal: Any = None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand the text to the iterating thread."""
        self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(self.stop_signal, timeout=self.timeout)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        text = self.text_queue.get(timeout=self.timeout)
        if text == self.stop_signal:
            raise StopIteration
        return str(text)


def is_ideograph(character: str) -> bool:
    """Whether it is a CJK ideograph, which is a word of its own."""
    code = ord(character)
    blocks = (
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
        (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
    )  # fmt: skip
    return any(first <= code <= last for first, last in blocks)
