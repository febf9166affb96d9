"""LLaMA in plain NumPy: to read, to run on a CPU, and to check other implementations against."""

from importlib.metadata import version

from llama_np.cache import KVCache
from llama_np.checkpoint import load
from llama_np.config import Config
from llama_np.model import classify, hidden_states, logits

__version__ = version("llama_np")

__all__ = ["Config", "KVCache", "classify", "hidden_states", "load", "logits"]
