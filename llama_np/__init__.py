"""LLaMA in plain NumPy: to read, to run on a CPU, and to check other implementations against."""

from importlib.metadata import version

from llama_np.cache import KVCache
from llama_np.checkpoint import load, load_tokenizer
from llama_np.config import Config
from llama_np.generate import generate, stream
from llama_np.hf import (
    FlaxLlamaForCausalLM,
    FlaxLlamaModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)
from llama_np.hf_auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from llama_np.hf_config import LlamaConfig
from llama_np.hf_encoding import AddedToken, BatchEncoding
from llama_np.hf_generation_config import GenerationConfig
from llama_np.hf_streamers import TextIteratorStreamer, TextStreamer
from llama_np.hf_tokenizer import LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast
from llama_np.memory import keep_freed_memory
from llama_np.model import classify, hidden_states, logits
from llama_np.sampling import Sampling
from llama_np.workers import share_products

__version__ = version("llama_np")

keep_freed_memory()

__all__ = [
    "AddedToken",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BatchEncoding",
    "Config",
    "FlaxLlamaForCausalLM",
    "FlaxLlamaModel",
    "GenerationConfig",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaModel",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "Sampling",
    "TextIteratorStreamer",
    "TextStreamer",
    "classify",
    "generate",
    "hidden_states",
    "load",
    "load_tokenizer",
    "logits",
    "share_products",
    "stream",
]
