"""Memory that NumPy frees is kept for the next arrays."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
import numpy as np
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def temporary():
    arrays = [np.ones(1 << 18, np.float32) for _ in range(8)]  # 1 MiB each
temporary(); temporary()
before = faults()
for _ in range(20):
    temporary()
print(faults() - before)
"""


def page_faults(first: str) -> int:
    """Page faults of making and freeing 160 MiB of temporary arrays in a fresh process."""
    code = COUNT_FAULTS.format(first=first)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their ways")
def test_temporary_arrays_cause_few_page_faults() -> None:
    kept, plain = page_faults("import llama_np"), page_faults("")
    assert kept < plain / 10  # 20 * 8 MiB are 40,960 pages when each is given back
