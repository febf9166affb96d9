"""What tests need to know about operating systems."""

import os
import sys

import pytest

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files, modes or signals")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and safe forks")

# The command; shells start background jobs, such as a test may be, deaf to interrupts.
LISTENING = """
import signal, sys
from llama_np.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""
