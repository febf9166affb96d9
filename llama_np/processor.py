"""The processor, as far as the system describes it: how products are made depends on it."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

CPU = Path("/sys/devices/system/cpu/cpu0")
CPUINFO = Path("/proc/cpuinfo")


@cache
def _described() -> dict[str, str]:
    """What Linux says of the first core, such as "cpu family"; empty on other systems."""
    try:
        first = CPUINFO.read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def processor_name() -> str:
    """The name by which the maker sells it, or at least its kind."""
    return _described().get("model name") or platform.processor() or platform.machine()


@cache
def halves_avx512() -> bool:
    """Whether it computes AVX-512, if it has it, in two halves, as AMD's Zen 4 does (family 25).

    Such a processor multiplies half as fast as it could, so that reading numbers in the order in
    which they lie is fast enough. Windows gives the family in the processor's name.
    """
    described = _described()
    if described:
        return (described.get("vendor_id"), described.get("cpu family")) == ("AuthenticAMD", "25")
    return platform.processor().startswith("AMD64 Family 25 ")


@cache
def second_level_cache() -> int:
    """Bytes of each core's second-level cache; 0 if the system does not say."""
    try:
        for described in CPU.glob("cache/index*"):
            if (described / "level").read_text(encoding="ascii").strip() == "2":
                size = (described / "size").read_text(encoding="ascii").strip()  # such as 2048K
                return int(size.removesuffix("K")) << 10
    except (OSError, ValueError):
        pass
    return 0
