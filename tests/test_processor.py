"""What is said of the processor, on systems that describe it differently."""

import platform
from pathlib import Path

import pytest

from llama_np import processor

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model name\t: Intel(R) Xeon(R) Processor

processor\t: 1
model name\t: another
"""
ZEN4 = XEON.replace("GenuineIntel", "AuthenticAMD").replace("family\t: 6", "family\t: 25")
ZEN5 = ZEN4.replace("family\t: 25", "family\t: 26")
ARM = "processor\t: 0\nCPU part\t: 0xd40\n"


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is known yet, and the system describes nothing."""
    for name in ("_described", "halves_avx512", "second_level_cache"):
        monkeypatch.setattr(processor, name, getattr(processor, name).__wrapped__)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor, "CPU", tmp_path)


@pytest.mark.parametrize(
    ("described", "name", "halves"),
    [
        (XEON, "Intel(R) Xeon(R) Processor", False),
        (ZEN4, "Intel(R) Xeon(R) Processor", True),
        (ZEN5, "Intel(R) Xeon(R) Processor", False),
        (ARM, "generic", False),
    ],
)
def test_linux_describes_the_processor(
    described: str, name: str, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "generic")
    processor.CPUINFO.write_text(described, encoding="utf-8")
    assert processor.processor_name() == name
    assert processor.halves_avx512() == halves


@pytest.mark.parametrize(
    ("name", "halves"),
    [
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", False),
        ("Intel64 Family 6 Model 140 Stepping 1, GenuineIntel", False),
        ("", False),
    ],
)
def test_windows_describes_the_processor_in_its_name(
    name: str, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "processor", lambda: name)
    assert processor.processor_name() == (name or platform.machine())
    assert processor.halves_avx512() == halves


def test_the_size_of_the_second_level_cache_is_said_in_kibibytes(tmp_path: Path) -> None:
    assert processor.second_level_cache() == 0
    for index, (level, size) in enumerate((("1", "48K"), ("1", "32K"), ("2", "2048K"))):
        folder = tmp_path / f"cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "level").write_text(level + "\n", encoding="ascii")
        (folder / "size").write_text(size + "\n", encoding="ascii")
    assert processor.second_level_cache() == 2 << 20
    (tmp_path / "cache/index2/size").write_text("unknown\n", encoding="ascii")
    assert processor.second_level_cache() == 0
