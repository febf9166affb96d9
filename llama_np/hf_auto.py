"""The Auto classes of the documentation's examples. There is one kind of model here: LLaMA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llama_np.checkpoint import locate
from llama_np.hf import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from llama_np.hf_config import LlamaConfig
from llama_np.hf_loading import split_options
from llama_np.hf_tokenizer import LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast
from llama_np.tokenizer import read_json

AutoConfig = LlamaConfig
AutoModel = LlamaModel
AutoModelForCausalLM = LlamaForCausalLM
AutoModelForSequenceClassification = LlamaForSequenceClassification


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained` gives a tokenizer of the class that the files name."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *inputs: Any,
        use_fast: bool = True,
        **kwargs: Any,
    ) -> LlamaTokenizer | LlamaTokenizerFast:
        """The fast tokenizer, as in transformers, where the package `tokenizers` is installed.

        It is a LlamaTokenizerFast if the files name LLaMA's class or none, otherwise a
        PreTrainedTokenizerFast, as for LLaMA 3.
        """
        name = pretrained_model_name_or_path
        fast = use_fast and find_spec("tokenizers") is not None
        kind = _fast_class(name, kwargs) if fast else LlamaTokenizer
        return kind.from_pretrained(name, *inputs, **kwargs)


def _fast_class(name: str | os.PathLike[str], options: Mapping[str, Any]) -> Any:
    if Path(name).is_file():
        return LlamaTokenizerFast
    folder = locate(name, weights=False, **split_options(options)[0])
    if not (folder / "tokenizer.json").exists():
        return LlamaTokenizerFast
    named = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    return LlamaTokenizerFast if named is None or "Llama" in str(named) else PreTrainedTokenizerFast
