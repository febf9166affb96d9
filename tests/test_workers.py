"""Products are the same when worker processes share them, whatever happens to a worker."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import LINUX

from llama_np import KVCache, generate, linear, load, logits, tasks, threads, workers
from llama_np.linear import SHARED
from llama_np.model import hidden_states
from llama_np.precision import to_bf16
from llama_np.tasks import MOST_ROWS
from llama_np.threads import blas_threads
from llama_np.workers import Team, share_products

pytestmark = LINUX  # elsewhere no process is forked

SHAPES = ((67, 40), (3, 41), (130, 64))  # (out, in): odd ones too
KINDS = ("float32", "float64", "bfloat16")


def matrices(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {}
    for kind in KINDS:
        for out, width in SHAPES:
            wide = random.standard_normal((out, width)).astype(np.float32)
            weight = to_bf16(wide) if kind == "bfloat16" else wide.astype(kind)
            found[f"{kind} {out}"] = weight
    return found


@contextmanager
def team(weights: dict[str, np.ndarray], processes: int = 2) -> Iterator[Team]:
    """A team for weights of any size."""
    team = Team([[weight] for weight in weights.values()], processes)
    try:
        yield team
    finally:
        team.close()


def asks_the_workers(pair: Team, M: int, weight: np.ndarray) -> bool:
    """Whether a product of M rows is shared."""
    with pytest.MonkeyPatch.context() as patch:
        asked: list[int] = []
        collect = pair._collect

        def collecting(rows: np.ndarray, number: int) -> dict[int, np.ndarray] | None:
            asked.append(number)
            return collect(rows, number)

        patch.setattr(pair, "_collect", collecting)
        linear.linear(np.ones((M, weight.shape[1]), np.float32), weight)
    return bool(asked)


@pytest.fixture(scope="module", autouse=True)
def threads_that_sleep_at_once() -> Iterator[None]:
    """Let the workers take part from the first product on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "AWAKE", 0.0)
        yield


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return matrices()


@pytest.fixture(scope="module", params=[(2, False), (3, False), (2, True)], ids=str)
def shared(weights: dict[str, np.ndarray], request: pytest.FixtureRequest) -> Iterator[None]:
    """A team of so many processes, as if BLAS had these kernels."""
    processes, avx512 = request.param
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, tasks):
            patch.setattr(module, "avx512_kernels", lambda: avx512)
        for name in ("BF16_BLOCK", "BF16_BLOCK_IN_CACHE"):
            patch.setattr(linear, name, 1000)  # several blocks for most shares of a weight
        with team(weights, processes):
            yield


@given(
    st.one_of(st.just(1), st.integers(0, MOST_ROWS + 2)),
    st.sampled_from(list(matrices())),
    st.booleans(),
)
@settings(max_examples=300)
def test_shared_products_equal_products_of_one_process(
    weights: dict[str, np.ndarray], shared: None, M: int, name: str, double: bool
) -> None:
    weight = weights[name]
    dtype = np.float64 if double or "float64" in name else np.float32
    rows = np.random.default_rng(M).standard_normal((M, weight.shape[1])).astype(dtype)
    product = linear.linear(rows, weight)
    assert product.dtype == dtype and id(weight) in SHARED
    alone = linear.strategy(M, weight)(rows, weight)
    # sums of at most 64 products of order 1; only their order differs
    tolerance = 1e-13 if dtype is np.float64 else 5e-5
    np.testing.assert_allclose(product, alone, atol=tolerance)


@contextmanager
def three_processes() -> Iterator[tuple[Team, list[np.ndarray], np.ndarray]]:
    """A team, the three weights of its first job, and the weight of its second one."""
    random = np.random.default_rng(1)
    sizes = [(67, 40), (1, 40), (20, 40), (30, 16)]
    *job, other = [random.standard_normal(size).astype(np.float32) for size in sizes]
    team = Team([job, [other]], 3)
    try:
        yield team, job, other
    finally:
        team.close()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=6))
@settings(max_examples=30)
def test_weights_of_one_job_may_be_asked_for_in_any_order_with_any_rows(
    requests: list[tuple[bool, int]],
) -> None:
    rows = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    with three_processes() as (_, job, _):
        for change, number in requests:
            if change:
                rows[0, 0] += 1  # the same array, but other numbers
            expected = rows @ job[number].T
            # sums of 40 products of order 1 to 7; only their order differs
            np.testing.assert_allclose(linear.linear(rows, job[number]), expected, atol=1e-4)


def test_a_job_is_computed_once_for_all_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(40, dtype=np.float32)[None]
    with three_processes() as (pair, job, other):
        assert asks_the_workers(pair, 1, other)
        linear.linear(rows, job[1])
        monkeypatch.setattr(pair, "_collect", None)  # would fail if it were called
        for weight in (job[2], job[0]):
            product = linear.linear(rows.copy(), weight)
            # 40 products of up to 100; float32 keeps 24 bits of their sum
            np.testing.assert_allclose(product, rows @ weight.T, rtol=1e-5, atol=1e-3)


def test_zeros_of_another_kind_are_other_rows() -> None:
    with three_processes() as (_, job, _):
        linear.linear(np.zeros((2, 40), np.float32), job[0])
        product = linear.linear(np.zeros((1, 40), np.float64), job[1])  # the same bytes
        assert product.shape == (1, 1) and product.dtype == np.float64
        product = linear.linear(np.zeros((2, 40), np.int32), job[2])
        assert product.shape == (2, 20)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), st.integers(2, 4))
def test_every_row_of_every_weight_is_one_processs_task(heights: list[int], processes: int) -> None:
    job = [np.zeros((height, 3), np.float32) for height in heights]
    board = tasks.Board([job])
    taken = [np.zeros(height, int) for height in heights]
    for number in range(processes):
        cuts = tasks.Desk(board, [job], number, processes).cuts(job)
        for count, cut in zip(taken, cuts, strict=True):
            if cut.start < cut.stop:
                count[cut] += 1
    assert all((count == 1).all() for count in taken)


def test_a_process_reads_ahead_in_the_order_of_the_last_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = ((300, 40), (2, 8), (500, 40))  # 750, 1 and 1,250 lines of 64 bytes
    jobs = [[np.zeros(size, np.float32)] for size in sizes]
    desk = tasks.Desk(tasks.Board(jobs), jobs, 0, 1)
    ahead = tasks.ReadAhead()
    assert list(ahead.steps) == []
    first, second, third = (desk.task(number, 1, 4) for number in range(3))
    for task in (first, second, third):
        ahead.is_done(task)
        assert list(ahead.steps) == []  # nobody knows yet what comes next
    monkeypatch.setattr(tasks, "LINES_AT_ONCE", 500)
    monkeypatch.setattr(tasks, "READ_AHEAD", 64 * 1000)
    ahead.is_done(first)  # the next token begins
    assert len(list(ahead.steps)) == 3  # the second's line, and 999 of the third's
    ahead.is_done(second)
    assert len(list(ahead.steps)) == 2  # 1,000 of the third weight's 1,250 lines
    ahead.is_done(third)
    assert len(list(ahead.steps)) == 4  # 750 of the first's, 1, and 250 of the third's


def test_weights_that_lie_column_by_column_are_multiplied_but_not_read_ahead() -> None:
    weight = np.asfortranarray(np.arange(1200, dtype=np.float32).reshape(30, 40))
    rows = np.ones((1, 40), np.float32)
    with team({"only": weight}) as pair:
        for _ in range(3):  # a worker that never stopped to skip them would not answer
            # sums of 40 whole numbers below 2^24 are exact
            np.testing.assert_array_equal(linear.linear(rows, weight), rows @ weight.T)
        ahead, task = tasks.ReadAhead(), pair.desk.task(0, 1, 4)
        for _ in range(2):
            ahead.is_done(task)
        assert list(ahead.steps) == []


def test_the_weights_of_a_layer_that_meet_the_same_rows_are_one_job() -> None:
    _, weights = load("fairytales")
    names = {id(w): name for name, w in weights["model.layers.1"].items()}
    found = [[names[id(w)] for w in job] for job in workers._jobs(weights) if id(job[0]) in names]
    attention, mlp = (
        [f"{module}_proj.weight" for module in modules.split()]
        for modules in ("self_attn.q self_attn.k self_attn.v", "mlp.gate mlp.up")
    )
    single = [["self_attn.o_proj.weight"], ["mlp.down_proj.weight"]]
    assert sorted(found) == sorted([attention, mlp, *single])
    every = [id(w) for job in workers._jobs(weights) for w in job]
    assert len(every) == len(set(every))
    assert {id(weights["lm_head.weight"]), id(weights["model.embed_tokens.weight"])} <= set(every)


def test_the_workers_really_take_part(weights: dict[str, np.ndarray]) -> None:
    weight = weights["float32 130"]
    rows = np.ones((1, 64), np.float32)
    with team(weights) as pair:
        expected = linear.linear(rows, weight)
        number = pair.job_of[id(weight)]
        ((_, board),) = pair.desk.task(number, 1, 4).products
        np.testing.assert_array_equal(board, expected)
        (cut,) = pair.workers[0].desk.cuts([weight])
        assert board[:, cut].any() and cut == slice(65, 130)


def test_afterwards_everything_is_as_before(weights: dict[str, np.ndarray]) -> None:
    count = blas_threads()
    with team(weights) as pair:
        linear.linear(np.ones((2, 64), np.float32), weights["bfloat16 130"])
        assert blas_threads() == 1
        processes = [worker.process for worker in pair.workers]
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)
    assert not SHARED and blas_threads() == count


def test_a_large_prompt_is_left_to_the_threads_of_blas(
    weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_threads = blas_threads()
    weight = weights["bfloat16 130"]
    with team(weights) as pair:
        large = (MOST_ROWS + 1) * sum(w.size for w in weights.values())
        monkeypatch.setattr(workers, "FEWEST_MULTIPLICATIONS", large)
        for M, expected in ((1, 1), (MOST_ROWS, 1), (MOST_ROWS + 1, all_threads), (1, 1)):
            assert asks_the_workers(pair, M, weight) == (M <= MOST_ROWS)
            assert blas_threads() == expected


def test_after_a_small_prompt_the_workers_need_not_wait(
    weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights["bfloat16 130"]
    monkeypatch.setattr(threads, "AWAKE", 1000.0)
    with team(weights) as pair:
        monkeypatch.setattr(threads.BLAS_LIMIT, "asleep", 0.0)
        assert not asks_the_workers(pair, MOST_ROWS + 1, weight) and blas_threads() == 1
        assert asks_the_workers(pair, 1, weight)


def test_small_prompts_one_after_the_other_are_as_good_as_a_large_one(
    weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_threads = blas_threads()
    weight, M = weights["bfloat16 130"], MOST_ROWS + 1
    with team(weights) as pair:
        one_pass = M * sum(w.size for w in weights.values())
        passes = (3 * one_pass - 1) // (
            M * weight.size
        )  # with this weight only, before it is too much
        monkeypatch.setattr(workers, "FEWEST_MULTIPLICATIONS", 3 * one_pass)
        for _ in range(2):
            for _ in range(passes):
                asks_the_workers(pair, M, weight)
                assert blas_threads() == 1
            asks_the_workers(pair, M, weight)
            assert blas_threads() == all_threads
            assert asks_the_workers(pair, 1, weight)  # from now on it counts anew


def test_with_avx512_float_weights_are_shared_for_as_many_rows_as_bfloat16_ones(
    weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = (0, 1, 5, 6, MOST_ROWS, MOST_ROWS + 1)
    for avx512, most in ((False, 5), (True, MOST_ROWS)):
        monkeypatch.setattr(tasks, "avx512_kernels", lambda avx512=avx512: avx512)
        with team(weights) as pair:
            for M in counts:
                assert asks_the_workers(pair, M, weights["float32 130"]) == (1 <= M <= most)


def test_workers_rest_while_python_threads_keep_every_core_busy(
    weights: dict[str, np.ndarray],
) -> None:
    weight = weights["float32 130"]
    with team(weights) as pair:
        with threads.BLAS_LIMIT.held():
            assert not asks_the_workers(pair, 1, weight)
        assert asks_the_workers(pair, 1, weight)


def test_workers_wait_until_the_threads_of_blas_sleep(
    weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights["bfloat16 130"]
    now = 100.0
    monkeypatch.setattr(threads, "AWAKE", 1.0)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with team(weights) as pair:
        assert not asks_the_workers(pair, 1, weight) and blas_threads() == 1
        now = 101.5
        assert asks_the_workers(pair, 1, weight)
        monkeypatch.setattr(workers, "FEWEST_MULTIPLICATIONS", 0)
        asks_the_workers(pair, MOST_ROWS + 1, weight)  # a prompt: BLAS uses its threads
        assert not asks_the_workers(pair, 1, weight)
        now = 103.0
        assert asks_the_workers(pair, 1, weight)


def test_a_killed_worker_costs_a_warning_and_no_result(weights: dict[str, np.ndarray]) -> None:
    weight = weights["float32 130"]
    rows = np.ones((1, 64), np.float32)
    with team(weights) as pair:
        expected = linear.linear(rows, weight)
        os.kill(pair.workers[0].process.pid or 0, signal.SIGKILL)
        with pytest.warns(UserWarning, match="a worker process has ended"):
            np.testing.assert_allclose(linear.linear(rows, weight), expected, atol=1e-5)
        assert not SHARED
        np.testing.assert_allclose(linear.linear(rows, weight), expected, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_ctrl_c_and_errors_leave_the_workers_ready(
    error: type[BaseException], weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights["float32 130"]
    rows = np.arange(64, dtype=np.float32)[None]
    with team(weights) as pair:
        expected = linear.linear(rows, weight)

        def interrupted(*arguments: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(tasks.Task, "do", interrupted)
            with pytest.raises(error):
                linear.linear(rows * 2, weight)
        assert pair.workers[0].process.is_alive() and id(weight) in SHARED
        np.testing.assert_array_equal(linear.linear(rows, weight), expected)


def test_a_second_thread_computes_by_itself(weights: dict[str, np.ndarray]) -> None:
    weight = weights["float32 130"]
    rows = np.arange(128, dtype=np.float32).reshape(2, 64)
    with team(weights) as pair, pair.one_at_a_time:
        results: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: results.append(linear.linear(rows, weight)))
        thread.start()
        thread.join()
    # 64 products of up to 500; float32 keeps 24 bits of their sum
    np.testing.assert_allclose(results[0], rows @ weight.T, rtol=1e-5, atol=1e-2)


def test_a_process_forked_by_somebody_else_leaves_the_workers_alone(
    weights: dict[str, np.ndarray],
) -> None:
    weight = weights["float32 67"]
    with team(weights) as pair:
        child = os.fork()
        if child == 0:
            os._exit(asks_the_workers(pair, 1, weight))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert asks_the_workers(pair, 1, weight)


ORPHAN = """
import time, numpy as np
from llama_np.workers import Team
team = Team([[np.ones((8, 4), np.float32)]], 2)
print(team.workers[0].process.pid, flush=True)
time.sleep(60)
"""


def test_workers_end_soon_after_their_parent_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20  # half a second is usual; the machine may be busy
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z":
            break  # dead, and nobody has asked for its exit status yet
        assert time.monotonic() < deadline, f"worker {pid} still runs"
        time.sleep(0.05)


def test_small_models_one_process_and_other_systems_stay_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = matrices()
    with share_products(small, 2) as count:
        assert count == 1 and not SHARED
    monkeypatch.setattr(workers, "FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(workers, "FEWEST_BYTES", 1)
    with share_products(small, 1) as count:
        assert count == 1 and not SHARED
    with share_products(small, 2) as count:
        assert count == 2 and len(SHARED) == len(small)
    monkeypatch.setattr(sys, "platform", "darwin")
    with share_products(small, 2) as count:
        assert count == 1 and not SHARED


def test_without_threadpoolctl_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(workers, "FEWEST_BYTES", 1)
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    monkeypatch.setattr(threads, "_blas", threads._blas.__wrapped__)
    with share_products(matrices(), 2) as count:
        assert count == 1 and not SHARED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_is_the_same(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FEWEST_WEIGHTS", 1)
    monkeypatch.setattr(workers, "FEWEST_BYTES", 1)
    config, weights = load("fairytales", dtype)
    prompts, tokens = [[1, 50, 60], [1, 70]], np.array([[1, 5]])
    alone = generate(prompts, weights, config, max_new_tokens=12)
    with share_products(weights, 2) as count:
        assert count == 2
        together = generate(prompts, weights, config, max_new_tokens=12)
        scores = logits(
            hidden_states(np.array([[1, 5]]), weights, config, KVCache(config)), weights
        )
    assert [t.token_ids for t in together] == [a.token_ids for a in alone]
    expected = logits(hidden_states(tokens, weights, config), weights)
    # float32 in another order of summation, through the whole model
    np.testing.assert_allclose(scores, expected, atol=2e-4)
