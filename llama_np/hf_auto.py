"""The Auto classes of the documentation's examples. There is one kind of model here: LLaMA."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from llama_np.hf import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from llama_np.hf_config import LlamaConfig
from llama_np.hf_tokenizer import LlamaTokenizer, LlamaTokenizerFast

AutoConfig = LlamaConfig
AutoModel = LlamaModel
AutoModelForCausalLM = LlamaForCausalLM
AutoModelForSequenceClassification = LlamaForSequenceClassification


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained` gives a LlamaTokenizerFast or a LlamaTokenizer."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *inputs: Any,
        use_fast: bool = True,
        **kwargs: Any,
    ) -> LlamaTokenizer | LlamaTokenizerFast:
        """The fast tokenizer, as in transformers, where the package `tokenizers` is installed."""
        fast = use_fast and find_spec("tokenizers") is not None
        kind = LlamaTokenizerFast if fast else LlamaTokenizer
        return kind.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
