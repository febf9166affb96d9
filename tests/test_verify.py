"""The verdict rule, names and layouts of other tools, and everything that must not pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_models import IDS, dump, golden, mistaken, plain, tiny

from llama_np.errors import CheckpointError, VerificationError
from llama_np.experiment import BFLOAT16, FLOAT16, FLOAT32, honest_runs, row_axis
from llama_np.layers import merge_heads
from llama_np.mistakes import BY_ID, variants
from llama_np.ports import possible_names, read_port, to_interleaved
from llama_np.precision import to_bf16
from llama_np.report import html_page
from llama_np.scalars import scalar_lines, signed_sum, signs, verify_scalars
from llama_np.trace import record as record_golden
from llama_np.trace import run_of
from llama_np.verify import Report, compare, hint, verify
from llama_np.weights import Stored, save_tensors

Dump = dict[str, np.ndarray]


def judged(arrays: Dump, precision: str | None = None) -> Report:
    return verify(golden(), arrays, precision=precision, check=False)


def clean() -> Dump:
    return dump(plain())


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16, FLOAT16])
def test_honest_runs_pass_in_every_precision(precision: object) -> None:
    for run in honest_runs(plain()):
        report = judged(dump(run, precision))  # type: ignore[arg-type]
        assert report.verdict == "pass" and report.precision == precision.name  # type: ignore[attr-defined]


@pytest.mark.parametrize(("times", "status"), [(1.5, "pass"), (3.0, "note"), (5.0, "fail")])
def test_the_error_is_measured_in_yardsticks(times: float, status: str) -> None:
    gold = golden().tensors["model.layers.1"].astype(np.float64)
    yardstick = golden().yardsticks["model.layers.1"]["float32"]
    noise = np.sign(np.random.default_rng(0).normal(size=gold.shape))
    noise *= np.linalg.norm(gold) / np.linalg.norm(noise)  # far from the peak limit
    report = judged({"model.layers.1": gold + times * yardstick * noise}, "float32")
    assert [f.status for f in report.findings] == [status]
    assert report.verdict == status


def test_tokens_before_texts_are_a_layout() -> None:
    blocks = [name for name in clean() if name.endswith(("layernorm", "v_proj", "mlp"))]
    arrays = {name: clean()[name].swapaxes(0, 1) for name in blocks}
    report = judged(arrays)
    assert report.verdict == "pass"
    assert {f.layout for f in report.findings} == {"tokens before texts"}


def test_keys_repeated_for_every_query_head_are_a_layout() -> None:
    name, config = "model.layers.1.self_attn.k_rot", golden().config
    G = config.num_attention_heads // config.num_key_value_heads
    by_group = np.repeat(golden().tensors[name], G, axis=1)
    for repeated in (by_group, by_group[0], by_group.swapaxes(1, 2)):
        report = judged({name: repeated})
        assert report.verdict == "pass"
        assert report.findings[0].layout.endswith("repeated for every query head")
    tiled = np.concatenate([golden().tensors[name]] * G, axis=1)  # another order of heads
    assert judged({name: tiled}).verdict == "fail"


def test_scores_before_the_scaling_are_equivalent_only_if_the_weights_are_right() -> None:
    scores, weights = (f"model.layers.1.self_attn.{local}" for local in ("scores", "weights"))
    arrays = clean()
    arrays[scores] = arrays[scores] * 3
    report = judged(arrays)
    found = {f.tensor: f for f in report.findings}[scores]
    assert report.verdict == "pass" and found.status == "equivalent"
    first = judged(mistaken("attn_scale_missing")).first_divergence
    assert first is not None and first.tensor == "model.layers.0.self_attn.scores"
    del arrays[weights]
    assert judged(arrays).verdict == "fail"


def test_probabilities_are_recognized() -> None:
    rows = golden().tensors["lm_head"].astype(np.float64)
    e = np.exp(rows - rows.max(axis=-1, keepdims=True))
    report = judged({"lm_head": e / e.sum(axis=-1, keepdims=True)})
    assert report.verdict == "fail" and "these are probabilities" in hint(report)


def test_logits_alone_say_that_more_is_needed() -> None:
    found = hint(judged({"lm_head": mistaken("act_gelu")["lm_head"]}))
    assert "dump the blocks, too" in found


def test_a_token_that_differs_is_not_blamed_on_attention() -> None:
    arrays = clean()
    del arrays["input_ids"]
    arrays["model.embed_tokens"] = arrays["model.embed_tokens"].copy()
    arrays["model.embed_tokens"][0, 2] *= -1
    assert "other token ids" in hint(judged(arrays))


def test_a_single_wrong_number_is_found() -> None:
    arrays = clean()
    gold = golden().tensors["lm_head"]
    yardstick = golden().yardsticks["lm_head"]["float32"]
    arrays["lm_head"] = gold.copy()
    arrays["lm_head"][0, 3, 5] += 12 * yardstick * np.abs(gold).max()
    report = judged(arrays)
    assert report.verdict == "fail"
    first = report.first_divergence
    assert first is not None and (first.tensor, first.position) == ("lm_head", 3)


@pytest.mark.parametrize(
    ("name", "tensor", "position", "words"),
    [
        ("rope_reversed", "model.layers.0.self_attn.q_rot", 1, "rotary"),
        ("causal_mask_missing", "model.layers.0.self_attn.weights", 0, "mask"),
        ("gqa_tile", "model.layers.0.self_attn.scores", 0, "heads"),
        ("act_gelu", "model.layers.0.mlp.act_fn", 0, "activation"),
        ("position_zero_decode", "model.rotary_emb.cos", 12, "prompt is right"),
        ("rms_weight_plus_one", "model.layers.0.input_layernorm", 0, "norm"),
        ("head_untied", "lm_head", 0, "head"),
    ],
)
def test_the_first_divergence_is_named(name: str, tensor: str, position: int, words: str) -> None:
    report = judged(mistaken(name))
    first = report.first_divergence
    assert first is not None and (first.tensor, first.position) == (tensor, position)
    assert words in report.as_dict()["first_divergence"]["hint"]


def renamed(arrays: Dump, rule: Callable[[str], str | None]) -> Dump:
    return {new: array for name, array in arrays.items() if (new := rule(name))}


CPP = {
    "model.embed_tokens": "inp_embd", "model.norm": "result_norm", "lm_head": "result_output",
    "input_layernorm": "attn_norm-{}", "self_attn.q_rot": "Qcur-{}", "self_attn.k_rot": "Kcur-{}",
    "self_attn.v_proj": "Vcur-{}", "self_attn.weights": "kq_soft_max-{}",
    "self_attn.context": "kqv_out-{}", "self_attn": "attn_out-{}", "middle": "ffn_inp-{}",
    "post_attention_layernorm": "ffn_norm-{}", "mlp.gate_proj": "ffn_gate-{}",
    "mlp.hidden": "ffn_swiglu-{}", "mlp": "ffn_out-{}", "": "l_out-{}",
}  # fmt: skip
LENS = {
    "model.embed_tokens": "hook_embed", "lm_head": "unembed.hook_out",
    "self_attn.q_proj": "blocks.{}.attn.hook_q", "self_attn.q_rot": "blocks.{}.attn.hook_rot_q",
    "self_attn.scores": "blocks.{}.attn.hook_attn_scores",
    "self_attn.weights": "blocks.{}.attn.hook_pattern",
    "self_attn.context": "blocks.{}.attn.hook_z",
    "self_attn": "blocks.{}.hook_attn_out", "middle": "blocks.{}.hook_resid_mid",
    "mlp.gate_proj": "blocks.{}.mlp.hook_pre", "mlp.hidden": "blocks.{}.mlp.hook_post",
    "": "blocks.{}.hook_resid_post",
}  # fmt: skip
META = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "input_layernorm": "layers.{}.attention_norm", "self_attn.q_proj": "layers.{}.attention.wq",
    "self_attn.o_proj": "layers.{}.attention.wo", "mlp.gate_proj": "layers.{}.feed_forward.w1",
    "mlp.up_proj": "layers.{}.feed_forward.w3", "mlp.down_proj": "layers.{}.feed_forward.w2",
    "": "layers.{}",
}  # fmt: skip


def in_style(table: dict[str, str]) -> Callable[[str], str | None]:
    def rule(name: str) -> str | None:
        parts = name.split(".", 3)
        if parts[:2] != ["model", "layers"]:
            return name if name == "input_ids" else table.get(name)
        new = table.get(parts[3] if len(parts) == 4 else "")
        return new.format(parts[2]) if new else None

    return rule


@pytest.mark.parametrize("table", [CPP, LENS, META], ids=["llama.cpp", "TransformerLens", "Meta"])
def test_names_of_other_tools_are_understood(table: dict[str, str]) -> None:
    arrays = renamed(clean(), in_style(table))
    report = judged(arrays)
    assert report.verdict == "pass" and not report.unknown
    assert len(report.findings) == len(arrays) - 1  # all but the ids
    assert judged(renamed(mistaken("act_relu"), in_style(table))).verdict == "fail"


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("model", "model.norm"),
        ("logits", "lm_head"),
        ("layers.2", "model.layers.2"),
        ("module.model.layers.1.mlp", "model.layers.1.mlp"),
        ("model.layers.0.self_attn.rotary_emb.sin", "model.rotary_emb.sin"),
        ("model.layers.1.self_attn.o_proj.input", "model.layers.1.self_attn.context"),
        ("model.layers.1.input_layernorm.input", "model.layers.0"),
        ("hidden_states.0", "model.embed_tokens"),
        ("hidden_states.3", "model.norm"),
        ("hidden_states.2", "model.layers.1"),
        ("attentions.1", "model.layers.1.self_attn.weights"),
        ("model/layers/1/mlp/up_proj", "model.layers.1.mlp.up_proj"),
        ("blocks.1.hook_resid_pre", "model.layers.0"),
    ],
)
def test_single_names(name: str, meaning: str) -> None:
    assert possible_names(name, layers=3)[0] == meaning


@pytest.mark.parametrize("name", ["model.layers.3", "optimizer.state", "layers.x.mlp", "mlp", ""])
def test_other_names_are_unknown(name: str) -> None:
    assert possible_names(name, layers=3) == []


LAYOUTS: dict[str, Callable[[str, np.ndarray], np.ndarray]] = {
    "without batch axis": lambda name, a: a[0],
    "float64": lambda name, a: a.astype(np.float64),
    "heads split": lambda name, a: (
        a.reshape(*a.shape[:-1], -1, 6) if name.endswith(("q_proj", "k_proj", "context")) else a
    ),
    "heads flat": lambda name, a: merge_heads(a) if name.endswith("_rot") else a,
    "tokens before heads": lambda name, a: a.swapaxes(1, 2) if name.endswith("_rot") else a,
    "half tables": lambda name, a: a[..., :3] if "rotary" in name else a,
    "scores of later tokens are -inf": lambda name, a: (
        np.where(np.tri(16, dtype=bool), a, -np.inf) if name.endswith("scores") else a
    ),
    "padded vocabulary": lambda name, a: (
        np.pad(a, [(0, 0), (0, 0), (0, 7)], constant_values=-1e9) if name == "lm_head" else a
    ),
    "only the prompt": lambda name, a: a.take(range(12), 2 if a.ndim == 4 else 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_pass_and_mistakes_in_them_do_not(layout: str) -> None:
    change = LAYOUTS[layout]
    for arrays, verdict in ((clean(), "pass"), (mistaken("rope_interleaved"), "fail")):
        ids = arrays.pop("input_ids")
        changed = {name: change(name, array) for name, array in arrays.items()}
        assert (
            judged({"input_ids": ids[:, : 12 if "prompt" in layout else 16]} | changed).verdict
            == verdict
        )


@pytest.mark.parametrize("axis", ["num_attention_heads", "num_key_value_heads"])
def test_as_many_tokens_as_heads_are_read_as_recorded_if_in_doubt(axis: str) -> None:
    short = record_golden(tiny(), IDS[: getattr(tiny()[0], axis)], decode=0)
    run, swap = run_of(short, tiny()[1]), LAYOUTS["tokens before heads"]
    right, wrong = dump(run), dump(variants(BY_ID["rope_reversed"], run)[0])
    for arrays in (right, {name: swap(name, array) for name, array in right.items()}):
        assert verify(short, arrays, check=False).verdict == "pass"
    name = f"model.layers.0.self_attn.{'q' if axis == 'num_attention_heads' else 'k'}_rot"
    [found] = [f for f in verify(short, wrong, check=False).findings if f.tensor == name]
    assert (found.status, found.position) == ("fail", 1)  # nothing is turned at position 0


ROTATED = ("q_proj", "k_proj", "q_rot", "k_rot", "cos", "sin")


def interleaved(arrays: Dump) -> Dump:
    return {n: to_interleaved(a, 6) if n.endswith(ROTATED) else a for n, a in arrays.items()}


def test_interleaved_pairs_are_a_layout() -> None:
    report = judged(interleaved(clean()))
    assert report.verdict == "pass"
    layouts = {f.tensor: f.layout for f in report.findings}
    assert layouts["model.layers.1.self_attn.q_rot"] == "interleaved rotary pairs"
    assert judged(interleaved(mistaken("rope_not_applied"))).verdict == "fail"


def test_unpermuted_weights_are_no_layout() -> None:
    report = judged(mistaken("rope_interleaved", form=1))
    first = report.first_divergence
    assert first is not None and first.tensor == "model.layers.0.self_attn.q_proj"


def test_shifted_positions_are_equivalent() -> None:
    run = plain()
    report = judged(dump(replace(run, positions=run.positions + 5)))
    assert report.verdict == "pass"
    assert {f.status for f in report.findings} == {"pass", "equivalent"}


def test_permuted_channels_heads_and_neurons_are_equivalent() -> None:
    arrays, rng = clean(), np.random.default_rng(0)
    channels, neurons = rng.permutation(6), rng.permutation(28)
    for name, array in arrays.items():
        if name.endswith(("q_rot", "k_rot")):
            arrays[name] = array[..., channels]
        if name.endswith(("q_proj", "k_proj")):
            arrays[name] = array.reshape(1, 16, -1, 6)[..., channels].reshape(array.shape)
        if name.endswith(("gate_proj", "up_proj", "act_fn", "hidden")):
            arrays[name] = array[..., neurons]
        if name.endswith(("scores", "weights")):
            arrays[name] = array[:, ::-1]
    assert judged(arrays).verdict == "pass"


def test_log_probabilities_are_logits_up_to_a_constant() -> None:
    arrays = clean()
    arrays["lm_head"] -= np.log(np.exp(arrays["lm_head"]).sum(axis=-1, keepdims=True))
    assert judged(arrays).verdict == "pass"


def test_padding_of_the_vocabulary_must_not_win() -> None:
    wide = np.pad(clean()["lm_head"], [(0, 0), (0, 0), (0, 3)], constant_values=1e6)
    assert judged({"lm_head": wide}).verdict == "fail"


def test_last_rows_of_the_last_layer_are_enough() -> None:
    arrays = clean()
    for name in ("model.layers.2.mlp", "model.layers.2", "model.norm", "lm_head"):
        arrays[name] = arrays[name][:, -5:]
    assert judged(arrays).verdict == "pass"


def test_tables_of_every_call_are_read() -> None:
    arrays = clean()
    for table in ("cos", "sin"):
        rows = arrays.pop(f"model.rotary_emb.{table}")[0]
        calls = np.concatenate([rows[:stop] for stop in (7, 12, 13, 14, 15, 16)])
        for layer in range(3):
            arrays[f"model.layers.{layer}.self_attn.rotary_emb.{table}"] = calls
    assert judged(arrays).verdict == "pass"


BROKEN: dict[str, Callable[[Dump], Dump]] = {
    "empty": lambda a: {},
    "unknown names only": lambda a: {"something": a["lm_head"]},
    "NaN": lambda a: a | {"model.layers.1": a["model.layers.1"] * np.nan},
    "infinity": lambda a: a | {"model.norm": a["model.norm"] + np.inf},
    "one column less": lambda a: a | {"lm_head": a["lm_head"][..., :-1]},
    "one row less": lambda a: a | {"model.layers.0.mlp": a["model.layers.0.mlp"][:, :-1]},
    "transposed": lambda a: a | {"model.layers.0": a["model.layers.0"].swapaxes(1, 2)},
    "zeros": lambda a: {name: np.zeros_like(array) for name, array in a.items()},
    "other ids": lambda a: a | {"input_ids": a["input_ids"] + 1},
    "too few ids": lambda a: a | {"input_ids": a["input_ids"][:, :9]},
    "ids that are no numbers": lambda a: a | {"input_ids": np.full((1, 16), np.nan)},
    "a bare number": lambda a: a | {"model.norm": np.array(1, np.float32)},
    "an empty array": lambda a: a | {"model.norm": np.zeros((1, 0, 20), np.float32)},
    "scaled": lambda a: a | {"model.norm": a["model.norm"] * 1.0001},
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_fails(how: str) -> None:
    assert judged(BROKEN[how](clean()), "float32").verdict == "fail"


def test_another_models_dump_fails() -> None:
    from models import tiny_model

    other = record_golden(tiny_model(np.float32, seed=5), IDS, decode=4)
    assert judged(dict(other.tensors)).verdict == "fail"


def test_points_that_were_not_captured_do_not_fail() -> None:
    few = {name: clean()[name] for name in ("model.layers.0", "lm_head")} | {"extra": np.ones(3)}
    report = judged(few)
    assert report.verdict == "pass" and report.unknown == ("extra",)
    assert "model.norm" in report.not_covered


def test_other_decoded_tokens_fail_but_earlier_rows_are_compared() -> None:
    arrays = mistaken("act_gelu")
    arrays["input_ids"][0, 14:] = 3
    report = judged(arrays)
    first = report.first_divergence
    assert report.problems and first is not None and first.tensor == "model.layers.0.mlp.act_fn"


def test_ids_alone() -> None:
    ids = clean()["input_ids"]
    for same in (ids, ids[0].astype(np.int32)):
        report = judged({"tokens": same})
        assert report.verdict == "note" and "only token ids" in report.notes[0]
    assert judged({"tokens": ids[:, :-1]}).verdict == "fail"
    assert judged({"tokens": ids[:, ::-1]}).verdict == "fail"
    assert judged({"tokens": ids, "hidden": np.ones(3)}).verdict == "fail"


def test_ids_that_were_given_show_nothing() -> None:
    truth = record_golden(tiny(), IDS)  # without tokens that the port would have to find itself
    report = verify(truth, {"tokens": truth.tokens}, check=False)
    assert report.verdict == "fail" and "nothing in common" in report.problems[0]


def top(arrays: Dump, k: int = 5) -> Dump:
    logits = arrays["lm_head"][0, -1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum())
    ids = np.argsort(-logprobs)[:k]
    return {"topk_ids": ids, "topk_logprobs": logprobs[ids]}


def test_the_best_log_probabilities_alone() -> None:
    assert judged(top(clean())).verdict == "pass"
    assert judged(top(mistaken("rms_eps"))).verdict == "fail"
    values = top(clean())
    assert judged(values | {"topk_ids": np.roll(values["topk_ids"], 1)}).verdict == "fail"


def response(arrays: Dump, style: str) -> dict[str, object]:
    """What a server answers to the golden prompt: five candidates for the first new tokens."""
    rows = arrays["lm_head"][0, 11:14].astype(np.float64)
    steps = []
    for row in rows:
        logprobs = row - np.log(np.exp(row).sum())
        best = np.argsort(-logprobs)[:5]
        steps.append([{"token": f"<{i}>", "id": int(i), "logprob": logprobs[i]} for i in best])
    if style == "chat":
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": s} for s in steps]}}]}
    if style == "completions":
        listed = [{c["token"]: c["logprob"] for c in step} for step in steps]
        return {"choices": [{"logprobs": {"top_logprobs": listed}}]}
    return {"completion_probabilities": [{"top_logprobs": step} for step in steps]}


@pytest.mark.parametrize("style", ["chat", "completions", "llama.cpp"])
def test_a_servers_response_is_taken_directly(style: str, tmp_path: Path) -> None:
    path = tmp_path / "response.json"
    path.write_text(json.dumps(response(clean(), style)))
    assert verify(golden(), path).verdict == "pass"
    path.write_text(json.dumps(response(mistaken("act_gelu"), style)))
    assert verify(golden(), path, check=False).verdict == "fail"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"choices": []}', "[" * 100_000, "\xff"])
def test_other_json_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "response.json"
    path.write_text(text)
    with pytest.raises(CheckpointError):
        verify(golden(), path)


def test_dumps_come_as_files_of_four_kinds(tmp_path: Path) -> None:
    arrays = clean()
    save_tensors(tmp_path / "d.safetensors", arrays)
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    for name, array in arrays.items():
        target = tmp_path / "folder" / f"{name.replace('.', '/')}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, array)
    bits = {
        n: Stored("BF16", to_bf16(a))
        for n, a in dump(plain(), BFLOAT16).items()
        if a.dtype.kind == "f"
    }
    save_tensors(tmp_path / "b.safetensors", bits)
    for name in ("d.safetensors", "d.npz", "folder"):
        assert verify(golden(), tmp_path / name).precision == "float32"
    assert verify(golden(), tmp_path / "b.safetensors").precision == "bfloat16"


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors", ".json"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x00" * 64])
def test_damaged_files_are_one_clear_error(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\."):
        verify(golden(), path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "lm_head.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(CheckpointError):
        verify(golden(), tmp_path)


def test_verify_raises_with_the_report_as_message() -> None:
    with pytest.raises(VerificationError, match=r"first divergence: model\.layers\.0\.mlp\.act_fn"):
        verify(golden(), mistaken("act_relu"))


def test_the_report_is_json() -> None:
    arrays = mistaken("act_relu") | {"model.norm": clean()["model.norm"] * np.inf}
    text = json.dumps(judged(arrays).as_dict(), allow_nan=False)
    assert json.loads(text)["first_divergence"]["tensor"] == "model.layers.0.mlp.act_fn"


def test_the_page_stands_alone() -> None:
    arrays = mistaken("gqa_tile") | {"</script><b>": np.ones(2, np.float32)}
    page = html_page(judged(arrays), golden(), "a </script> title")
    assert page.count("</script>") == 1 and "http://www.w3.org/2000/svg" in page
    assert not any(word in page for word in ("src=", "href=", "@import", "url("))
    start = page.index("const data = ") + len("const data = ")
    data = json.loads(page[start : page.index(";\nconst $")])
    assert data["first"] == "model.layers.0.self_attn.scores"
    assert [row["label"] for row in data["rows"]] == [
        "input",
        "layer 0",
        "layer 1",
        "layer 2",
        "output",
    ]
    assert len(data["arrays"][data["first"]]["profile"]) == 16
    assert len(data["arrays"][data["first"]]["heads"]) == 8


def test_the_signs_are_those_that_any_language_computes() -> None:
    expected = [-1.0 if (i * 2654435761) % 2**32 >> 31 else 1.0 for i in range(100)]
    assert signs(100).tolist() == expected


def test_one_printed_number_per_array_is_enough() -> None:
    lines = [" ".join(line.split()[:3]) for line in scalar_lines(golden()) if line[0] != "#"]
    log = "booting ...\n" + "\n".join(f"[info] {line}" for line in lines)
    report = verify_scalars(golden(), log)
    assert report.verdict == "pass" and len(report.findings) == len(lines)
    lines[40] = " ".join([*lines[40].split()[:2], "1e9"])
    assert verify_scalars(golden(), "\n".join(lines)).verdict == "fail"
    assert verify_scalars(golden(), "nothing here").verdict == "fail"


def test_scalars_without_call_numbers_count_calls_themselves() -> None:
    name, gold = "model.layers.1", golden().tensors["model.layers.1"]
    rows = [(0, 7), (7, 12), (12, 13)]
    log = "\n".join(f"{name} = {signed_sum(name, gold[:, a:b]):.9e}" for a, b in rows)
    report = verify_scalars(golden(), log)
    assert report.verdict == "pass" and len(report.findings) == 3


@pytest.mark.parametrize("name", ["rope_theta", "act_gelu", "gqa_tile", "rms_eps", "cache_hole"])
def test_scalars_show_mistakes(name: str) -> None:
    trace = mistaken(name)
    log = "\n".join(
        f"{block} 0 {signed_sum(block, trace[block][:, :7])}\n"
        f"{block} 2 {signed_sum(block, trace[block][:, 12:13])}"
        for block in ("model.layers.0", "model.layers.2", "lm_head")
    )
    assert verify_scalars(golden(), log).verdict == "fail"


def test_a_batch_with_padding_is_compared_without_the_padding() -> None:
    truth = record_golden(tiny(), [IDS, IDS[:5]], decode=2)
    arrays = {name: array.copy() for name, array in truth.tensors.items()}
    arrays["model.layers.1"][1, :7] = 99
    arrays["model.layers.1.self_attn.scores"][1, :, :7] = np.nan
    assert compare(truth, read_port(arrays, truth.config)).verdict == "pass"
    arrays["model.layers.1"][1, 7:] += 1
    assert compare(truth, read_port(arrays, truth.config)).verdict == "fail"


def test_a_wrong_projection_is_not_excused_by_readers_that_nearly_agree() -> None:
    arrays = {n: a for n, a in clean().items() if not n.endswith(("q_rot", "k_rot", "scores"))}
    wrong = arrays["model.layers.1.self_attn.q_proj"].copy()
    wrong[..., 3] = 0
    assert judged(arrays | {"model.layers.1.self_attn.q_proj": wrong}).verdict == "fail"
    doubled = 2 * arrays["model.layers.1.self_attn.q_proj"]
    assert judged(arrays | {"model.layers.1.self_attn.q_proj": doubled}).verdict == "pass"


def test_a_row_that_is_fully_masked_is_called_so() -> None:
    report = judged(mistaken("causal_mask_strict", form=2))
    first = report.first_divergence
    assert first is not None and first.tensor == "model.layers.0.self_attn.weights"
    assert "only at position 0: fully masked" in hint(report)


def first_rows(n: int) -> Dump:
    """A dump that ends after n tokens."""
    arrays = {}
    for name, array in dump(plain()).items():
        axis = 1 if name == "input_ids" else row_axis(name)
        arrays[name] = array.take(range(n), axis)
    return arrays


def test_a_partly_decoded_dump_says_what_to_do() -> None:
    advice = "the prompt's 12 and 2 of 4 decode steps: dump all 16, or only the 12, or record with"
    for arrays in (first_rows(14), {"lm_head": first_rows(14)["lm_head"]}):
        report = judged(arrays)
        assert report.verdict == "fail" and f"{advice} --decode 2" in str(report)
    assert judged(first_rows(12)).verdict == "pass"


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_are_right_but_the_first_ones_do_not_pass(rows: int) -> None:
    arrays = first_rows(rows)
    del arrays["input_ids"]
    assert judged(arrays).verdict == "fail"
    assert judged({"lm_head": arrays["lm_head"]}).verdict == "fail"


@pytest.mark.parametrize("rows", [slice(11, 12), slice(15, 16), slice(12, 16), slice(11, 16)])
def test_the_rows_that_somebody_reads_are_enough(rows: slice) -> None:
    assert judged({"lm_head": dump(plain())["lm_head"][:, rows]}).verdict == "pass"


def test_missing_words_are_counted() -> None:
    arrays = dump(plain())
    arrays["lm_head"] = arrays["lm_head"][..., :-3]
    report = judged(arrays)
    assert report.verdict == "fail"
    assert f"3 of {tiny()[0].vocab_size} columns are missing" in str(report)
