"""Memory that NumPy frees is kept for the next arrays; scratch is handed out in turn."""

import platform
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llama_np.memory import LINE, Scratch, empty_in_one_block
from llama_np.precision import places_to_widen, widen_bf16

CACHE_LINE = LINE // 2  # numbers of 16 bits

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


def test_scratch_is_handed_out_in_turn() -> None:
    scratch = Scratch(4 * CACHE_LINE)
    pieces = [scratch.take(CACHE_LINE + 1, within=4 * CACHE_LINE) for _ in range(3)]
    assert [len(piece) for piece in pieces] == [CACHE_LINE + 1] * 3
    assert not np.shares_memory(pieces[0], pieces[1])
    assert np.shares_memory(pieces[0], pieces[2])  # the end was reached


def test_scratch_is_handed_out_within_a_part_of_it() -> None:
    scratch = Scratch(100 * CACHE_LINE)
    pieces = [scratch.take(CACHE_LINE, within=2 * CACHE_LINE) for _ in range(3)]
    assert not np.shares_memory(pieces[0], pieces[1])
    assert np.shares_memory(pieces[0], pieces[2])


def test_scratch_grows_for_a_piece_larger_than_all_of_it() -> None:
    scratch = Scratch(CACHE_LINE)
    for count in (5 * CACHE_LINE, 1):
        assert len(scratch.take(count, within=CACHE_LINE)) == count


def test_every_thread_has_scratch_of_its_own() -> None:
    scratch = Scratch(CACHE_LINE)

    def take() -> np.ndarray:
        return scratch.take(CACHE_LINE, within=CACHE_LINE)

    mine, others = take(), []
    thread = threading.Thread(target=lambda: others.append(take()))
    thread.start()
    thread.join()
    assert len(others) == 1 and not np.shares_memory(mine, others[0])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), max_size=12), st.data())
def test_what_was_widened_before_in_the_same_scratch_leaves_no_trace(
    shapes: list[tuple[int, int]], data: st.DataObject
) -> None:
    scratch = Scratch(10 * CACHE_LINE)
    for shape in shapes:
        bits = data.draw(arrays(np.uint16, shape, elements=st.integers(0, 0x7F80)))  # no NaN
        halves = scratch.take(2 * bits.size + 2, within=10 * CACHE_LINE)
        places, numbers = places_to_widen(shape, halves)
        places[...] = bits
        np.testing.assert_array_equal(numbers, widen_bf16(bits))


def test_arrays_in_one_block_have_their_shapes_and_share_nothing() -> None:
    kinds = {"a": (3, 5), "b": (7,), "none": (0, 4), "c": (2, 2)}
    dtypes = {"a": np.float32, "b": np.uint16, "none": np.float64, "c": np.float64}
    found = empty_in_one_block({n: (s, np.dtype(dtypes[n])) for n, s in kinds.items()})
    for number, (name, array) in enumerate(found.items()):
        array[...] = number
        assert array.shape == kinds[name] and array.dtype == dtypes[name]
        assert array.flags.c_contiguous and array.flags.aligned
    for number, array in enumerate(found.values()):
        assert (array == number).all()
    assert len({id(block_of(array)) for array in found.values()}) == 1


def block_of(array: np.ndarray) -> object:
    """The array that owns the memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
