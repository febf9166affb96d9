"""Marks for tests of what only some operating systems have."""

import os
import sys

import pytest

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files, modes or signals")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc and safe forks")
