"""A prompt in chunks, some of them at once, gives what it gives in one pass."""

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SCALINGS, tiny_model

from llama_np import KVCache, LlamaConfig, LlamaForCausalLM, chunks, hidden_states, logits, threads
from llama_np.chunks import hidden_in_chunks, in_chunks, threads_that_pay
from llama_np.config import Config
from llama_np.generate import pad, prefill
from llama_np.linear import TILE
from llama_np.model import ModelWeights
from llama_np.perplexity import score_batch
from llama_np.threads import BLAS_LIMIT, blas_threads

CONFIG, WEIGHTS = tiny_model(max_position_embeddings=512)
EXACT = 1e-10  # numbers of order 1 in float64; only the order of sums differs
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 40))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads, each with chunks of 8 or 16 tokens, whatever the work."""
    monkeypatch.setattr(chunks, "CHUNK", 16)
    monkeypatch.setattr(chunks, "threads_that_pay", lambda rows, config: 3)


def new_cache(batch: int = 1, config: Config = CONFIG) -> KVCache:
    return KVCache(config, batch, dtype=np.float64)


ragged = st.lists(
    st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=70),
    min_size=1,
    max_size=3,
)


@given(ragged, st.integers(0, 20))
@settings(max_examples=60)
def test_chunks_at_once_equal_one_pass(rows: list[list[int]], known: int) -> None:
    prefix = np.broadcast_to(np.arange(known) % CONFIG.vocab_size, (len(rows), known))
    cache, other = new_cache(len(rows)), new_cache(len(rows))
    for memory in (cache, other):
        hidden_states(prefix, WEIGHTS, CONFIG, memory)
    tokens, positions = pad(rows, known)
    whole = hidden_states(tokens, WEIGHTS, CONFIG, other, positions)
    hidden = hidden_in_chunks(tokens, WEIGHTS, CONFIG, cache, positions)
    real = positions >= 0  # padding reads whatever there is, and nobody reads it
    np.testing.assert_allclose(hidden[real], whole[real], atol=EXACT)
    assert cache.length == other.length == known + tokens.shape[1]
    np.testing.assert_array_equal(cache.positions, other.positions)
    kept = cache.positions[:, : cache.length] >= 0
    for mine, theirs in zip(cache, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a.swapaxes(1, 2)[kept], b.swapaxes(1, 2)[kept], atol=EXACT)


def run(weights: ModelWeights, config: Config, delays: dict[int, float]) -> np.ndarray:
    """TOKENS in chunks of 16, each after a delay."""

    def compute(part: slice, cache: KVCache) -> np.ndarray:
        time.sleep(delays.get(part.start, 0))
        places = np.arange(part.start, part.stop)[None]
        return hidden_states(TOKENS[:, part], weights, config, cache, places)

    return in_chunks(compute, np.arange(40)[None], config, new_cache())


@pytest.mark.parametrize("slow", [0, 16, 32])
def test_a_chunk_waits_for_the_chunks_before_it(slow: int) -> None:
    whole = hidden_states(TOKENS, WEIGHTS, CONFIG)
    np.testing.assert_allclose(run(WEIGHTS, CONFIG, {slow: 0.1}), whole, atol=EXACT)


def test_chunks_are_computed_at_once_in_the_callers_context_with_one_thread_of_blas() -> None:
    together = threading.Barrier(3)

    def compute(part: slice, cache: KVCache) -> np.ndarray:
        together.wait(timeout=30)
        assert blas_threads() == 1 and np.geterr()["over"] == "ignore"
        return np.full((1, part.stop - part.start, 1), part.start)

    before = blas_threads()
    with np.errstate(over="ignore"):
        hidden = in_chunks(compute, np.arange(40)[None], CONFIG, new_cache())
    assert hidden[0, :, 0].tolist() == [0] * 16 + [16] * 16 + [32] * 8
    assert blas_threads() == before


@pytest.mark.parametrize("failing", [0, 16, 32])
@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
@pytest.mark.parametrize("count", [1, 3])
def test_after_an_error_everything_is_as_before(
    failing: int, error: type[BaseException], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "threads_that_pay", lambda rows, config: count)
    cache = new_cache()
    hidden_states(TOKENS[:, :5], WEIGHTS, CONFIG, cache)
    before, running = blas_threads(), threading.active_count()

    def compute(part: slice, memory: KVCache) -> np.ndarray:
        if part.start <= failing < part.stop:
            raise error
        places = np.arange(5 + part.start, 5 + part.stop)[None]
        return hidden_states(TOKENS[:, part], WEIGHTS, CONFIG, memory, places)

    with pytest.raises(error):
        in_chunks(compute, np.arange(5, 45)[None], CONFIG, cache)
    assert cache.length == 5 and (cache.positions[0] >= 0).tolist() == [True] * 5 + [False] * 59
    assert (blas_threads(), threading.active_count()) == (before, running)


@pytest.fixture(params=["longrope", "dynamic"])
def by_length(request: pytest.FixtureRequest) -> Iterator[tuple[Config, ModelWeights]]:
    """A model whose rotations depend on the length of the whole text."""
    yield tiny_model(rope_scaling=SCALINGS[request.param])


def test_a_prompt_that_changes_its_rotations_is_read_whole(
    by_length: tuple[Config, ModelWeights],
) -> None:
    config, weights = by_length
    whole = logits(hidden_states(TOKENS, weights, config)[:, -1:], weights)[:, 0]
    scores = prefill(TOKENS.tolist(), weights, config, new_cache(config=config))
    np.testing.assert_allclose(scores, whole, atol=EXACT)


def hugging_face_model() -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": CONFIG.vocab_size, "hidden_size": 24}
    sizes |= {"intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def test_scoring_and_the_hugging_face_classes_read_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = hugging_face_model()
    whole = model(TOKENS, use_cache=False).logits
    (one,) = score_batch([TOKENS[0].tolist()], WEIGHTS, CONFIG)
    used: list[int] = []
    at_once = chunks._at_once

    def counted(compute: chunks.Compute, columns: list[slice], *rest: object) -> np.ndarray:
        used.append(len(columns))
        return at_once(compute, columns, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(chunks, "_at_once", counted)
    # float32 logits of order 1
    np.testing.assert_allclose(model(TOKENS).logits, whole, atol=1e-5)
    (two,) = score_batch([TOKENS[0].tolist()], WEIGHTS, CONFIG)
    assert two.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-8)
    assert used == [3, 3]
    model(TOKENS, output_attentions=True)  # somebody looks at whole arrays
    assert used == [3, 3]


def test_left_padding_of_the_hugging_face_classes_reads_as_in_one_pass() -> None:
    model = hugging_face_model()
    mask = (np.arange(40) >= 21)[None].astype(np.int64)
    whole = model(TOKENS, attention_mask=mask, use_cache=False).logits
    # float32 logits of order 1; those of the padding, too
    np.testing.assert_allclose(model(TOKENS, attention_mask=mask).logits, whole, atol=1e-5)


@pytest.mark.parametrize("T", [7, 8, 16, 17])
def test_too_few_chunks_for_all_threads_are_computed_one_after_the_other(
    T: int,
) -> None:
    used: list[int] = []

    def compute(part: slice, cache: KVCache) -> np.ndarray:
        used.append(threading.get_ident())
        return np.zeros((1, part.stop - part.start, 1))

    in_chunks(compute, np.arange(T)[None], CONFIG, new_cache())
    assert (set(used) == {threading.get_ident()}) == (T <= 16)


@pytest.mark.parametrize(
    ("count", "resting", "unpacked", "rows", "expected"),
    [
        (2, True, False, 128, 2),
        (2, True, False, 127, 1),  # too few rows for each
        (2, True, True, 64, 2),
        (2, True, True, 63, 1),
        (2, False, True, 128, 1),  # too little work while the threads of BLAS are awake
        (2, False, False, 512, 2),
        (8, True, False, 511, 1),
        (8, True, False, 512, 8),
        (1, True, True, 4096, 1),
        (None, True, False, 4096, 1),  # threads cannot be limited without threadpoolctl
    ],
)
def test_chunks_are_computed_at_once_where_it_pays(
    count: int | None,
    resting: bool,
    unpacked: bool,
    rows: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    monkeypatch.setattr(chunks, "avx512_kernels", lambda: unpacked)
    monkeypatch.setattr(chunks, "halves_avx512", lambda: unpacked)
    monkeypatch.setattr(BLAS_LIMIT, "all_threads", lambda: count)
    monkeypatch.setattr(BLAS_LIMIT, "resting", lambda: False)
    monkeypatch.setattr(BLAS_LIMIT, "look", lambda: resting)
    assert threads_that_pay(rows, config) == expected


def test_a_prompt_pays_for_later_ones_where_the_threads_of_blas_will_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(CONFIG, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    monkeypatch.setattr(BLAS_LIMIT, "all_threads", lambda: 2)
    monkeypatch.setattr(BLAS_LIMIT, "look", lambda: False)
    for limited, expected in ((False, 1), (True, 2)):
        monkeypatch.setattr(BLAS_LIMIT, "limited", limited)
        monkeypatch.setattr(BLAS_LIMIT, "asleep", math.inf)
        assert threads_that_pay(128, config) == expected


growths = st.floats(1e-6, 0.01)  # 135 million parameters: 0.0005


@given(st.integers(0, 2000), st.integers(1, 8), st.integers(0, 10_000), growths)
def test_chunks_cover_all_columns_in_order(T: int, count: int, start: int, growth: float) -> None:
    parts = chunks.chunks(T, count, start, growth)
    assert parts[0].start == 0 and parts[-1].stop == T
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert all(part.start % TILE == 0 for part in parts)


@given(st.integers(0, 5000), st.integers(1, 4), st.integers(0, 10_000), growths)
def test_chunks_at_once_take_the_same_time(
    length: int, count: int, start: int, growth: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 256)
        parts = chunks.chunks(256 * count + length, count, start, growth)
    work = [sum(1 + growth * (start + n) for n in range(p.start, p.stop)) for p in parts]
    # both edges of a chunk are rounded by up to half a tile
    most = 2 * TILE * (1 + growth * (start + parts[-1].stop))
    for first in range(0, len(work), count):
        at_once = work[first : first + count]
        assert max(at_once) - min(at_once) <= most


def test_chunks_are_at_most_twice_as_long_as_without_attention() -> None:
    parts = chunks.chunks(100_000, 2, 0, 0.0005)
    assert max(part.stop - part.start for part in parts) <= 2 * chunks.CHUNK


def test_the_limit_of_blas_is_held_by_all_who_need_it() -> None:
    before = blas_threads()
    with BLAS_LIMIT.held():
        with BLAS_LIMIT.held():
            BLAS_LIMIT.set(False)
            assert blas_threads() == 1 and BLAS_LIMIT.all_threads() == before
        assert blas_threads() == 1
    assert blas_threads() == before
    BLAS_LIMIT.set(True)
    with BLAS_LIMIT.held():
        pass
    assert blas_threads() == 1
    BLAS_LIMIT.set(False)
    assert blas_threads() == before


def test_the_threads_of_blas_rest_some_time_after_the_limit_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert not BLAS_LIMIT.resting()
    BLAS_LIMIT.set(True)
    try:
        assert not BLAS_LIMIT.resting()
        now += threads.AWAKE
        assert BLAS_LIMIT.resting()
    finally:
        BLAS_LIMIT.set(False)
    assert not BLAS_LIMIT.resting()


@pytest.mark.parametrize("busy", [False, True])
def test_threads_that_take_no_processor_time_rest(
    busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = iter([1.0, 1.0 + busy * threads.LOOK])
    monkeypatch.setattr(time, "process_time", lambda: next(spent))
    BLAS_LIMIT.set(True)
    try:
        assert not BLAS_LIMIT.resting()
        assert BLAS_LIMIT.look() is not busy
        assert BLAS_LIMIT.resting() is not busy
    finally:
        BLAS_LIMIT.set(False)
