"""Golden files: what is recorded, how it is stored, and what makes the values true."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_models import IDS, golden, plain, tiny
from models import at_rest_in_bf16, random_tokens, tiny_config, tiny_model
from slow_llama import slow_logits

from llama_np import trace
from llama_np.checkpoint import expected_shapes
from llama_np.config import config_to_dict
from llama_np.errors import CheckpointError
from llama_np.experiment import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    error,
    evaluate,
    honest_runs,
    names_in_order,
    one_call,
)
from llama_np.trace import load_golden, make_run, open_model, record, run_of, weights_hash
from llama_np.weights import read_header, save_tensors

EXACT = 1e-12  # float64 sums in another order


def test_every_named_point_is_recorded_in_execution_order() -> None:
    assert list(golden().tensors) == names_in_order(golden().config.num_hidden_layers)


def test_the_truth_is_what_slow_loops_compute() -> None:
    config, weights = tiny_model(np.float64)
    recorded = record((config, weights), IDS, decode=2, store=np.float64)
    expected = slow_logits(recorded.tokens[0].tolist(), weights, config)
    assert error(recorded.tensors["lm_head"][0], expected) < EXACT


def test_any_chunking_gives_the_same_truth() -> None:
    whole = record(tiny(), IDS, store=np.float64)
    for chunks in ((1,) * 12, (5, 7), (3, 4, 5)):
        parts = record(tiny(), IDS, chunks=chunks, store=np.float64)
        for name, array in whole.tensors.items():
            assert error(parts.tensors[name], array) < EXACT, name


def test_decode_steps_are_the_greedy_tokens() -> None:
    tokens, logits = golden().tokens[0], golden().tensors["lm_head"][0]
    assert tokens[:12].tolist() == IDS
    assert (logits[11:-1].argmax(axis=-1) == tokens[12:]).all()


def test_a_row_of_a_padded_batch_is_the_text_alone() -> None:
    both = record(tiny(), [IDS, IDS[:5]], store=np.float64)
    alone = record(tiny(), IDS[:5], store=np.float64)
    for name in ("lm_head", "model.layers.1.self_attn.context", "model.layers.0.mlp.hidden"):
        assert error(both.tensors[name][1:, -5:], alone.tensors[name]) < EXACT, name
        assert (both.tensors[name][1, :-5] == 0).all(), name


def test_a_token_never_changes_earlier_rows() -> None:
    other = record(tiny(), [*IDS[:-1], 2], store=np.float64)
    same = record(tiny(), IDS, store=np.float64)
    for name in ("model.layers.2", "lm_head"):
        assert (other.tensors[name][:, :-1] == same.tensors[name][:, :-1]).all()


def test_shifting_all_positions_changes_no_logit() -> None:
    run = plain()
    moved, _ = evaluate(replace(run, positions=run.positions + 9))
    here, _ = evaluate(run)
    assert error(moved["lm_head"], here["lm_head"]) < 1e-10  # angles of larger positions
    assert (
        error(moved["model.layers.0.self_attn.q_rot"], here["model.layers.0.self_attn.q_rot"]) > 0.1
    )


def test_one_call_computes_what_many_calls_do() -> None:
    single, _ = evaluate(one_call(plain()))
    stepwise, _ = evaluate(plain())
    assert max(error(single[name], stepwise[name]) for name in stepwise) < EXACT


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_lengths_that_change_rotations_are_run_call_by_call(scaling: str) -> None:
    from models import SCALINGS

    model = tiny_model(np.float64, rope_scaling=SCALINGS[scaling])
    run = make_run(model, random_tokens(model[0], 1, 20)[0].tolist(), decode=2)
    assert one_call(run).calls == run.calls


def test_yardsticks_cover_every_order_of_summation() -> None:
    truth = {name: array.astype(np.float64) for name, array in golden().tensors.items()}
    for precision in (FLOAT32, BFLOAT16, FLOAT16):
        for run in honest_runs(plain()):
            trace, _ = evaluate(run, precision)
            for name, gold in truth.items():
                # The golden values were rounded to float32 after the yardsticks were taken.
                assert error(trace[name], gold) <= golden().yardsticks[name][precision.name] + 1e-7


def test_yardsticks_grow_as_precision_falls() -> None:
    for yardstick in golden().yardsticks.values():
        assert yardstick["float32"] < yardstick["float16"] < yardstick["bfloat16"] or (
            yardstick["float32"] == 0  # the embedding is only looked up
        )


def test_a_golden_file_comes_back_as_it_was(tmp_path: Path) -> None:
    golden().save(tmp_path / "g.safetensors")
    again = load_golden(tmp_path / "g.safetensors")
    assert again.calls == (7, 5, 1, 1, 1, 1) and again.prompt == 12
    assert again.config == golden().config
    for name, array in golden().tensors.items():
        assert np.array_equal(again.tensors[name], array)
        for precision, value in golden().yardsticks[name].items():
            assert again.yardsticks[name][precision] == pytest.approx(value, rel=1e-3)


def test_the_metadata_answers_every_question(tmp_path: Path) -> None:
    golden().save(tmp_path / "g.safetensors")
    _, data = read_header(tmp_path / "g.safetensors")
    assert json.loads(data["config"]) == json.loads(json.dumps(config_to_dict(golden().config)))
    assert data["axes/model.layers.0.self_attn.q_rot"] == "B,N,T,H"
    assert data["weights_sha256"] == weights_hash(tiny()[1])
    assert json.loads(data["input_ids"]) == golden().tokens.tolist()
    assert json.loads(data["config_sources"])["hidden_size"] == "config.json"
    for key in ("rule", "rope_layout", "calls", "decode_steps", "numpy", "blas", "llama_np"):
        assert data[key]


@pytest.mark.parametrize(
    ("points", "count"), [("all", 3 + 3 * 20 + 3), ("blocks", 7), ("logits", 2)]
)
def test_points_choose_what_is_kept(points: str, count: int) -> None:
    assert len(record(tiny(), IDS, points=points).tensors) == count


def test_the_hash_does_not_depend_on_how_weights_are_stored() -> None:
    config, weights = tiny()
    resting = at_rest_in_bf16(weights)
    widened = open_model((config, resting))[1]
    assert weights_hash(widened) == weights_hash(resting) != weights_hash(weights)


def test_weights_that_rest_in_bf16_are_read_exactly() -> None:
    config, weights = tiny()
    resting = at_rest_in_bf16(weights)
    trace, _ = evaluate(make_run((config, resting), IDS), FLOAT64)
    assert trace["lm_head"].dtype == np.float64
    assert error(trace["lm_head"], evaluate(make_run((config, weights), IDS))[0]["lm_head"]) < 0.05


def test_large_models_are_widened_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_np import experiment

    monkeypatch.setattr(experiment, "KEPT_WHOLE", 0)
    weights = experiment.Prepared(tiny()[1], FLOAT64, plain())
    for layer in range(3):
        assert weights[f"model.layers.{layer}"]["mlp.up_proj.weight"].dtype == np.float64
        assert len(weights.ready) == 1
    trace, _ = evaluate(plain(), names=frozenset(["lm_head"]))
    assert error(trace["lm_head"], golden().tensors["lm_head"]) < 1e-7  # stored as float32


def test_a_model_without_a_head_is_recorded_up_to_its_norm() -> None:
    config, weights = tiny()
    headless = {name: array for name, array in weights.items() if name != "lm_head.weight"}
    recorded = record((config, headless), IDS)
    assert "lm_head" not in recorded.tensors and "model.norm" in recorded.tensors
    with pytest.raises(ValueError, match="lm_head"):
        record((config, headless), IDS, decode=1)


def test_a_folder_is_read_as_it_is_stored(tmp_path: Path) -> None:
    config = tiny_config()
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=shape).astype(np.float16)
        for name, shape in expected_shapes(config).items()
    }
    save_tensors(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    _, weights = open_model(tmp_path)
    assert weights["lm_head.weight"].dtype == np.float16


@pytest.mark.parametrize(
    ("ids", "wrong"), [([], ValueError), ([1.5], TypeError), ([[1], []], ValueError),
                       ([-1], TypeError), ([41], IndexError)],
)  # fmt: skip
def test_bad_ids_are_refused(ids: list[int], wrong: type[Exception]) -> None:
    with pytest.raises(wrong):
        record(tiny(), ids)


def test_chunks_must_add_up() -> None:
    with pytest.raises(ValueError, match="12 tokens"):
        record(tiny(), IDS, chunks=(5, 5))


def test_other_files_are_no_golden_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"lm_head": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="no golden file"):
        load_golden(path)
    golden().save(path, overwrite=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        load_golden(path)


def test_a_golden_file_with_nan_is_refused(tmp_path: Path) -> None:
    broken = {**golden().tensors, "lm_head": golden().tensors["lm_head"] * np.nan}
    replace(golden(), tensors=broken).save(tmp_path / "g.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_golden(tmp_path / "g.safetensors")


def test_progress_is_told() -> None:
    heard: list[str] = []
    record(tiny(), IDS, decode=1, progress=heard.append)
    assert "float64: call 2 of 2" in heard and "honest bfloat16 runs" in heard


def test_the_bundled_model_is_recorded() -> None:
    recorded = record("fairytales", IDS, points="blocks")
    assert recorded.about["parameters"].isdigit()
    assert run_of(recorded, open_model("fairytales")[1]).tokens.shape == (1, 12)


def test_what_does_not_fit_into_memory_is_refused_with_the_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record(tiny(), IDS)
    monkeypatch.setattr(trace, "physical_memory", lambda: 100_000)
    with pytest.raises(MemoryError, match=r"1 x 12 tokens needs about .* GB, more than"):
        record(tiny(), IDS)
    record(tiny(), IDS, points="blocks")
