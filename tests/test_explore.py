"""The page of a forward pass is complete, self-contained, small, and true."""

import base64
import json
import re
from typing import Any

import numpy as np
import pytest

from llama_np import hidden_states, load, load_tokenizer, logits
from llama_np.explore import MOST_TOKENS, page
from llama_np.tap import record

CONFIG, WEIGHTS = load("fairytales")
TOKENIZER = load_tokenizer("fairytales")
TEXT = "Once upon a time there was a king </script><b>"


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found.group(1))
    return data


PAGE = page(TEXT, WEIGHTS, CONFIG, TOKENIZER)
DATA: dict[str, Any] = data_of(PAGE)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    urls = set(re.findall(r"https?://[^\"'\s<]+", PAGE.split('id="data"')[0]))
    urls |= set(re.findall(r"https?://[^\"'\s<]+", PAGE.rsplit("</script>", 2)[1]))
    assert urls <= {"http://www.w3.org/2000/svg"}  # the name of a namespace, never fetched
    assert not re.search(r"(src|href)\s*=", PAGE)


def test_text_cannot_break_out_of_the_data() -> None:
    assert PAGE.count("</script>") == 2
    assert DATA["ids"] == TOKENIZER.encode(TEXT)


def test_spellings_in_the_data_cannot_end_the_script() -> None:
    class Hostile:
        vocab_size = TOKENIZER.vocab_size

        def encode(self, text: str) -> list[int]:
            return TOKENIZER.encode(text)

        def tokens(self, ids: Any) -> list[str]:
            return ["</script><script>alert(1)" for _ in ids]

    assert page("king", WEIGHTS, CONFIG, Hostile()).count("</script>") == 2  # type: ignore[arg-type]


def test_a_prompt_of_32_tokens_stays_below_5_megabytes() -> None:
    words = TOKENIZER.decode(TOKENIZER.encode("the king and the bear " * 20)[:32])
    assert len(page(words, WEIGHTS, CONFIG, TOKENIZER).encode()) < 5_000_000


def test_the_numbers_are_those_of_the_model() -> None:
    ids = np.array([TOKENIZER.encode(TEXT)])
    trace: dict[str, np.ndarray] = {}
    hidden = hidden_states(ids, WEIGHTS, CONFIG, tap=record(trace))
    scores = logits(hidden, WEIGHTS)[0]
    shown = np.frombuffer(base64.b64decode(DATA["logits"]), "<f4").reshape(scores.shape)
    np.testing.assert_array_equal(shown, scores)
    weights = np.frombuffer(base64.b64decode(DATA["attention"]), np.uint8)
    L, N, T = CONFIG.num_hidden_layers, CONFIG.num_attention_heads, ids.shape[1]
    first = weights.reshape(L, N, T, T)[2] / 255
    recorded = trace["model.layers.2.self_attn.weights"][0]
    np.testing.assert_allclose(first, recorded, atol=0.5 / 255 + 1e-6)  # stored in 8 bits
    best = [row[0][0] for row in DATA["lens"][-1]]
    np.testing.assert_array_equal(best, scores.argmax(axis=-1))


def test_every_array_of_the_trace_is_listed_with_the_line_that_makes_it() -> None:
    trace: dict[str, np.ndarray] = {}
    hidden = hidden_states(np.array([TOKENIZER.encode(TEXT)]), WEIGHTS, CONFIG, tap=record(trace))
    logits(hidden, WEIGHTS, tap=record(trace))
    assert [array["name"] for array in DATA["arrays"]] == list(trace)
    for array in DATA["arrays"]:
        assert array["shape"] == list(trace[array["name"]].shape)
        line = DATA["sources"][array["source"]]["text"].split("\n")[array["line"]]
        module = re.sub(r"^model\.layers\.\d+\.?", "", array["name"])
        assert f'"{module}"' in line if module else "tap(name," in line


def test_texts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=str(MOST_TOKENS)):
        page("king " * 100, WEIGHTS, CONFIG, TOKENIZER)
