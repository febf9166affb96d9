"""One assertion for the test suite of another implementation; needs no plugin and no pytest."""

from __future__ import annotations

import os

from llama_np.errors import VerificationError
from llama_np.explain import explain
from llama_np.ports import Dump, Port, read_port
from llama_np.replay import replay
from llama_np.trace import Golden, Model, load_golden
from llama_np.verify import FAIL, Report, hint, verify


def assert_matches_golden(
    dump: Dump,
    golden: Golden | str | os.PathLike[str],
    model: Model | None = None,
    *,
    precision: str | None = None,
) -> Report:
    """Return the report of a comparison that does not fail.

    dump, golden, precision: as for `verify`; model: the checkpoint that the golden file was
    recorded from, by which a failure is explained too.
    Errors: VerificationError, whose message begins with the first divergence, then names the
    mistake and the faulty ops (with a model), and ends with all arrays; as `verify` for files
    that cannot be read, as `explain` for another model than the golden file's.
    """
    truth = golden if isinstance(golden, Golden) else load_golden(golden)
    port = read_port(dump, truth.config, precision)
    report = verify(truth, port, check=False)
    if report.verdict != FAIL:
        return report
    lines = [_headline(report)]
    if model is not None:
        found = explain(truth, port, model)
        lines += [f"{cause.mistake}: {cause.cause} -> {cause.advice}" for cause in found.causes]
        lines += [] if found.causes else [f"no known mistake explains it: {found.verdict}"]
        lines += _faulty(port, truth, model) if port.arrays else []
    raise VerificationError("\n".join([*lines, "", str(report)]))


def _headline(report: Report) -> str:
    first = report.first_divergence
    if first is None:
        return "; ".join(report.problems)
    where = f"{first.tensor} is the first wrong array, from position {first.position}"
    return f"{where}: {hint(report)}"


def _faulty(port: Port, golden: Golden, model: Model) -> list[str]:
    found = replay(port, model, golden=golden)
    ops = [fault.op for fault in found.faulty]
    more = f" and {len(ops) - 6} more" if len(ops) > 6 else ""
    return [f"faulty ops: {', '.join(ops[:6])}{more}"] if ops else []
