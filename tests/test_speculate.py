"""Guesses change how fast a text appears, and nothing else.

Several tokens in one pass are summed in another order than one by one. In float64 that moves
scores by about 1e-15, so no token of a random model changes.
"""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import QUICK, SCALINGS, tiny_model

from llama_np import KVCache, LlamaConfig, LlamaForCausalLM, load, load_tokenizer
from llama_np.chat import Chat
from llama_np.cli import main
from llama_np.config import Config
from llama_np.generate import TextReader, Token, generate, prefill, stream
from llama_np.rope import steady_length
from llama_np.sampling import Sampling
from llama_np.speculate import Draft, DraftModel, PromptLookup

CONFIG, WEIGHTS = tiny_model(eos_token_id=[])
FAIRYTALES, TALES = load("fairytales", np.float64)
TOKENIZER = load_tokenizer("fairytales")
SAMPLINGS = (
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.8, top_k=20, top_p=0.9),
    Sampling(temperature=1.5, min_p=0.01, repetition_penalty=1.1),
)


class Rehearsed(Draft):
    """Knows the text; token number i of it is guessed wrong where `wrong[i % len(wrong)]`."""

    def __init__(self, text: Sequence[int], count: int, wrong: Sequence[bool] = (False,)) -> None:
        super().__init__()
        self.text, self.count, self.wrong = text, count, wrong

    def guess(self, ids: np.ndarray) -> np.ndarray:
        places = range(len(ids), len(ids) + self.count)
        known = [self.text[i] if i < len(self.text) else 0 for i in places]
        shifts = [int(self.wrong[i % len(self.wrong)]) for i in places]
        return (np.array(known) + shifts) % CONFIG.vocab_size


class Letters:
    """A tokenizer for which every token is a letter; with `halves`, some are half of one."""

    def __init__(self, halves: bool = False) -> None:
        self.halves = halves

    def decode_stream(self, prompt_ids: Sequence[int]) -> Any:
        self.half = False
        return self

    def push(self, index: int) -> str:
        self.half = self.halves and index % 7 == 3 and not self.half
        return "" if self.half else chr(97 + index % 5)

    def flush(self) -> str:
        return "?" if self.half else ""


def run(
    prompt: Sequence[int], weights: Any, config: Config, draft: Draft | None, **options: Any
) -> tuple[list[Token], KVCache]:
    """What comes out, and what the cache then holds."""
    cache = options.pop("cache", None) or KVCache(config, dtype=np.float64)
    tokens = stream([prompt], weights, config, cache=cache, draft=draft, **options)
    return list(tokens), cache


def assert_same_cache(mine: KVCache, expected: KVCache) -> None:
    assert mine.length == expected.length
    np.testing.assert_array_equal(
        mine.positions[:, : mine.length], expected.positions[:, : mine.length]
    )
    for pair, other in zip(mine, expected, strict=True):
        for array, wanted in zip(pair, other, strict=True):
            np.testing.assert_allclose(array, wanted, atol=1e-11)  # float64, other summation order


def assert_same_tokens(mine: list[Token], expected: list[Token]) -> None:
    def exact(tokens: list[Token]) -> list[tuple[Any, ...]]:
        return [
            (t.row, t.id, t.text, t.finish_reason, [i for i, _ in t.top_logprobs]) for t in tokens
        ]

    def numbers(tokens: list[Token]) -> list[float]:
        return [p for t in tokens for p in (t.logprob or 0, *(p for _, p in t.top_logprobs))]

    assert exact(mine) == exact(expected)
    np.testing.assert_allclose(numbers(mine), numbers(expected), atol=1e-11)  # as above


@st.composite
def drafts(draw: st.DrawFn) -> Any:
    """A function from (config, weights, the text) to something that guesses."""
    count, wrong = draw(st.integers(1, 9)), draw(st.lists(st.booleans(), min_size=1, max_size=5))
    ngram, schedule = draw(st.integers(1, 3)), draw(st.sampled_from(["heuristic", "constant"]))
    small_config, small_weights = tiny_model(seed=draw(st.integers(0, 9)), num_hidden_layers=1)
    return draw(
        st.sampled_from(
            [
                lambda config, weights, text: Rehearsed(text, count, wrong),
                lambda config, weights, text: PromptLookup(count, ngram),
                lambda config, weights, text: DraftModel(
                    TextReader(weights, config), count, schedule
                ),
                lambda config, weights, text: DraftModel(
                    TextReader(small_weights, small_config), count, schedule
                ),
            ]
        )
    )


@settings(QUICK, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    scaling=st.sampled_from(sorted(SCALINGS)),
    make_draft=drafts(),
    length=st.sampled_from([*range(1, 16), 30, 31, 32, 33]),
    known=st.integers(0, 10),
    sampling=st.sampled_from(SAMPLINGS),
    options=st.fixed_dictionaries(
        {"max_new_tokens": st.sampled_from([40, 25, 12, 7, 2, 1, 0])},
        optional={
            "stop_ids": st.lists(st.integers(0, 40), max_size=3),
            "stop_strings": st.lists(st.text("abcde", min_size=2, max_size=4), max_size=2),
            "logprobs": st.integers(0, 3),
        },
    ),
)
def test_whatever_is_guessed_nothing_changes(
    seed: int,
    scaling: str,
    make_draft: Any,
    length: int,
    known: int,
    sampling: Sampling,
    options: dict[str, Any],
) -> None:
    config, weights = tiny_model(seed=seed, rope_scaling=SCALINGS[scaling], eos_token_id=7)
    half = np.random.default_rng(seed).integers(0, config.vocab_size, length // 2 + 1)
    prompt = np.tile(half, 2)[:length].tolist()

    def tokens(draft: Draft | None) -> tuple[list[Token], KVCache]:
        cache = KVCache(config, dtype=np.float64)
        if known:
            prefill([prompt[:known]], weights, config, cache)
        options.update(sampling=sampling, seeds=[seed], tokenizer=Letters(halves=True))
        return run(prompt, weights, config, draft, cache=cache, **options)

    expected, plain = tokens(None)
    text = prompt + [token.id for token in expected if token.id is not None]
    found, guessed = tokens(make_draft(config, weights, text))
    assert_same_tokens(found, expected)
    assert_same_cache(guessed, plain)


PROMPT = [3, 8, 1, 17]
TEXT = PROMPT + generate([PROMPT], WEIGHTS, CONFIG, max_new_tokens=20)[0].token_ids


@pytest.mark.parametrize("wrong", [[False], [True], [False, True, False]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop_ids": [TEXT[9]]},
        {"stop_strings": ["".join(chr(97 + i % 5) for i in TEXT[10:12])]},
        {"max_new_tokens": 6},
        {"max_new_tokens": 40},  # the context of 32 tokens is full before
    ],
)
def test_a_text_may_end_inside_a_guess(wrong: list[bool], options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 20, "logprobs": 2, "tokenizer": Letters()} | options
    expected, plain = run(PROMPT, WEIGHTS, CONFIG, None, **options)
    found, guessed = run(PROMPT, WEIGHTS, CONFIG, Rehearsed(TEXT, 7, wrong), **options)
    assert_same_tokens(found, expected)
    assert_same_cache(guessed, plain)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("count", [2, 9])
def test_every_token_is_rotated_as_if_it_came_alone(scaling: str, count: int) -> None:
    config, weights = tiny_model(eos_token_id=[], rope_scaling=SCALINGS[scaling])
    expected, plain = run(PROMPT, weights, config, None)
    text = PROMPT + [token.id for token in expected if token.id is not None]
    assert len(text) == 32  # the trained length; 16 before the scaling
    found, guessed = run(PROMPT, weights, config, Rehearsed(text, count, [False, False, True]))
    assert_same_tokens(found, expected)
    assert_same_cache(guessed, plain)


@pytest.mark.parametrize("count", range(1, 20))
def test_leaving_early_leaves_the_cache_as_without_guesses(count: int) -> None:
    def begin(draft: Draft | None) -> tuple[list[Token], KVCache]:
        cache = KVCache(CONFIG, dtype=np.float64)
        tokens = stream([PROMPT], WEIGHTS, CONFIG, max_new_tokens=20, cache=cache, draft=draft)
        found = [next(tokens) for _ in range(count)]
        tokens.close()  # type: ignore[attr-defined]
        return found, cache

    (expected, plain), (found, guessed) = (
        begin(None),
        begin(Rehearsed(TEXT, 5, [False, False, True])),
    )
    assert_same_tokens(found, expected)
    assert_same_cache(guessed, plain)


def test_a_cache_of_fixed_size_is_never_overrun_by_a_guess() -> None:
    stop: dict[str, Any] = {"stop_ids": [TEXT[12]], "max_new_tokens": 25}
    needed = TEXT.index(TEXT[12], len(PROMPT))
    cache = KVCache(CONFIG, capacity=needed, dtype=np.float64)
    (plain,) = generate([PROMPT], WEIGHTS, CONFIG, **stop)
    (done,) = generate(
        [PROMPT], WEIGHTS, CONFIG, cache=cache, draft=Rehearsed(TEXT, 30, [True]), **stop
    )
    assert done == plain


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass reads, pass by pass."""
    counts: list[int] = []
    extend = KVCache.extend

    def counting(self: KVCache, positions: np.ndarray) -> np.ndarray:
        counts.append(positions.shape[1])
        return extend(self, positions)

    monkeypatch.setattr(KVCache, "extend", counting)
    return counts


def test_right_guesses_spare_passes_and_wrong_ones_none(passes: list[int]) -> None:
    right, never = Rehearsed(TEXT, 4), Rehearsed(TEXT, 4, [True])
    generate([PROMPT], WEIGHTS, CONFIG, max_new_tokens=20, draft=right)
    assert passes == [4, 5, 5, 5, 4]  # the first token needs no guess, the last pass no fifth
    assert (right.guessed, right.accepted) == (15, 15)
    passes.clear()
    generate([PROMPT], WEIGHTS, CONFIG, max_new_tokens=20, draft=never)
    assert passes == [4, *[5] * 15, 4, 3, 2, 1]
    assert (never.guessed, never.accepted) == (66, 0)


def test_prompt_lookup_pauses_after_wrong_guesses_and_goes_on_after_a_right_one() -> None:
    lookup, ids = PromptLookup(1), np.array([5, 6, 5])
    asked = []
    for _ in range(4):
        asks = 0
        while not len(lookup.guess(ids)):
            asks += 1
        asked.append(asks)
        lookup.learn(0, 1)
    assert asked == [0, 1, 3, 7]
    assert lookup.pause == lookup.waiting == 7
    lookup.learn(1, 1)
    assert lookup.guess(ids).tolist() == [6]


def test_prompt_lookup_goes_on_after_the_first_occurrence_of_the_longest_ngram() -> None:
    lookup = PromptLookup(3)
    assert lookup.guess(np.array([1, 2, 3, 4, 5, 9, 2, 8, 1, 2])).tolist() == [3, 4, 5]
    assert lookup.guess(np.array([1, 2, 3, 4, 5, 9, 7, 2])).tolist() == [3, 4, 5]
    assert lookup.guess(np.array([5, 5])).tolist() == [5]
    assert lookup.guess(np.array([1, 2, 3])).tolist() == []
    assert lookup.guess(np.array([1])).tolist() == []


@given(st.data())
def test_a_smaller_model_writes_the_same_whatever_it_read_before(data: st.DataObject) -> None:
    texts = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    draft = DraftModel(TextReader(WEIGHTS, CONFIG), 3, "constant")
    for text in data.draw(st.lists(texts, min_size=2, max_size=4)):
        (alone,) = generate([text], WEIGHTS, CONFIG, max_new_tokens=3)
        assert draft.guess(np.array(text)).tolist() == alone.token_ids


def test_a_smaller_model_that_was_interrupted_reads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = TextReader(WEIGHTS, CONFIG)
    draft = DraftModel(reader, 3, "constant")
    draft.guess(np.array(PROMPT))
    with monkeypatch.context() as patch:
        patch.setattr(reader, "weights", {**WEIGHTS, "lm_head.weight": None})  # fails at the end
        with pytest.raises(AttributeError):
            draft.guess(np.array(TEXT[:7]))
    assert draft.guess(np.array(TEXT[:7])).tolist() == TEXT[7:10]


def test_the_heuristic_schedule_follows_success() -> None:
    draft = DraftModel(TextReader(WEIGHTS, CONFIG), 2)
    counts = []
    for accepted in (True, True, False, False):
        guessed = len(draft.guess(np.array(PROMPT)))
        draft.learn(guessed if accepted else 0, guessed)
        counts.append(draft.count)
    assert counts == [4, 6, 5, 4]
    for _ in range(9):
        draft.learn(0, 1)
    assert draft.count == 1


def test_a_pass_ends_where_rotations_change() -> None:
    def limits(scaling: str) -> list[float]:
        config = tiny_model(rope_scaling=SCALINGS[scaling])[0]
        return [steady_length(config, length) for length in (3, 16, 17, 32, 33)]

    assert limits("longrope") == [16, 16, np.inf, np.inf, np.inf]
    assert limits("dynamic") == [32, 32, 32, 32, 33]
    assert limits("yarn") == [np.inf] * 5


@pytest.mark.parametrize(
    ("prompts", "cache"),
    [([], None), ([[1], [2]], None), ([[1]], KVCache(CONFIG, 2, dtype=np.float64))],
)
def test_a_draft_is_for_one_text(prompts: list[list[int]], cache: KVCache | None) -> None:
    with pytest.raises(ValueError, match=r"single prompt only|holds 2 rows"):
        generate(prompts, WEIGHTS, CONFIG, draft=PromptLookup(2), cache=cache)


def test_guessers_refuse_what_makes_no_sense() -> None:
    for count, max_ngram in ((0, 2), (2, 0), (-1, 2)):
        with pytest.raises(ValueError, match="expected 1 or more"):
            PromptLookup(count, max_ngram)
    with pytest.raises(ValueError, match="sometimes"):
        DraftModel(TextReader(WEIGHTS, CONFIG), 2, "sometimes")


# ------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with the words of the bundled model, but another one."""
    return save_model(tmp_path_factory.mktemp("smaller"), vocab_size=FAIRYTALES.vocab_size)


def save_model(folder: Path, vocab_size: int) -> str:
    config = LlamaConfig(vocab_size, 16, 24, 1, 2, max_position_embeddings=512)
    LlamaForCausalLM(config, seed=3).save_pretrained(folder)
    return str(folder)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    assert main(arguments) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("guesser", [["--prompt-lookup", "4"], ["--draft", "fairytales"], None])
@pytest.mark.parametrize("hot", [[], ["--temp", "0.6", "--seed", "3"]])
def test_the_command_shows_the_same_text_and_counts_the_guesses(
    guesser: list[str] | None, hot: list[str], smaller: str, capsys: pytest.CaptureFixture[str]
) -> None:
    guesser = ["--draft", smaller] if guesser is None else guesser
    options = ["generate", "Go away, go away, go", "-n", "24", "--dtype", "float64", *hot]
    plain, _ = command(capsys, *options)
    text, notes = command(capsys, *options, *guesser)
    assert text == plain
    answer = json.loads(command(capsys, *options, *guesser, "--json")[0])
    assert 0 <= answer["accepted_tokens"] <= answer["guessed_tokens"] > 0
    counts = f"{answer['accepted_tokens']} of {answer['guessed_tokens']} guesses accepted"
    assert counts in notes
    if guesser[1] == "fairytales" and not hot:  # it knows exactly what it will say
        assert answer["accepted_tokens"] == answer["guessed_tokens"]


def test_a_saved_prompt_holds_no_guesses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["generate", "Go away, go away, go", "-n", "6", "--save-cache"]
    plain, _ = command(capsys, *options, str(tmp_path / "plain"))
    guess = ["--prompt-lookup", "4"]
    text, _ = command(capsys, *options, str(tmp_path / "guessed"), *guess)
    assert text == plain
    assert (tmp_path / "guessed").read_bytes() == (tmp_path / "plain").read_bytes()
    loaded, _ = command(capsys, *options[:4], "--load-cache", str(tmp_path / "plain"), *guess)
    assert loaded == plain


def test_a_chat_says_the_same_with_guesses_in_every_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for guess in ([], ["--prompt-lookup", "3"], ["--draft", "fairytales"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n and so\n/regen\n"))
        text, notes = command(capsys, "chat", "-n", "16", "--dtype", "float64", *guess)
        said.append(text)
        assert ("guesses accepted" in notes) == bool(guess)
    assert said[0] == said[1] == said[2]


def test_an_answer_that_is_stopped_leaves_a_cache_that_can_be_gone_on_from() -> None:
    def talk(draft: Draft | None) -> list[str]:
        chat = Chat(FAIRYTALES, TALES, TOKENIZER, max_tokens=12, draft=draft)
        answer = chat.answer("Once upon a time")
        for _ in range(5):
            next(answer)
        answer.close()  # type: ignore[attr-defined]
        return ["".join(t.text for t in chat.answer(" and then")), *map(str, chat.messages)]

    plain = talk(None)
    assert talk(PromptLookup(3)) == plain
    assert talk(DraftModel(TextReader(TALES, FAIRYTALES))) == plain


def test_what_cannot_be_guessed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_model(tmp_path / "other", vocab_size=50)
    lines = tmp_path / "lines"
    lines.write_text("a\nb\n", "utf-8")
    cases = [
        (["generate", "x", "--draft", other], "vocabulary of 50 tokens"),
        (["chat", "--draft", other], "vocabulary of 50 tokens"),
        (["generate", "x", "--draft", "no/such/folder"], "no/such/folder"),
        (["generate", "--prompts", str(lines), "--prompt-lookup", "3"], "single prompt"),
        (["generate", "--prompts", str(lines), "--draft", "fairytales"], "single prompt"),
    ]
    for arguments, message in cases:
        assert main(arguments) == (2 if "--prompts" in arguments else 1)  # 2: wrong usage
        output = capsys.readouterr()
        assert output.out == ""
        assert message in output.err
        assert output.err.count("\n") == 1
    for usage in (["--prompt-lookup", "0"], ["--prompt-lookup", "3", "--draft", "fairytales"]):
        with pytest.raises(SystemExit, match="2"):
            main(["generate", "x", *usage])
