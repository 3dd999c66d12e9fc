"""Exports: what other programs read of a run is what the run says."""

import csv
import io
import sys
from dataclasses import replace

import pytest

import normc
from normc.errors import NormcError
from normc.search.archive import Archive, Record, mean, scores
from normc.search.evolve import Candidate
from normc.search.export import hall_of_fame, to_optuna, to_tensorboard
from normc.search.genome import Genome, Node
from normc.search.outcome import Outcome
from normc.search.setting import Setting

pytestmark = pytest.mark.plain

GENOME = Genome((Node("NEG", (0,)),))
LAYERS = (
    "x*gamma + beta",
    "-x*gamma + beta",  # which a spreadsheet would like to compute
    "t0 = group_mean(x)\nsquare(t0/signed_log(t0))*gamma + beta",
    "tanh(x)*gamma + beta",
    "exp(x)*gamma + beta",
    "sigmoid(x)*gamma + beta",
)
OUTCOMES = (
    Outcome("ok", scores=(0.5, 0.6), seconds=1.23456),
    Outcome("ok", scores=(0.9, 0.8), seconds=2.0),
    Outcome("ok", scores=(0.7, 0.95), seconds=3.0),
    Outcome("quality", "resnet has 0.1", seconds=0.5),
    Outcome("crash", "signal 11"),
    None,
)
PARENTS = (None, 0, 1, None, 2, 1)


def made(**setting):
    how = Setting(architectures=("resnet", "mobilenet"), **setting)
    rows = enumerate(zip(LAYERS, OUTCOMES, PARENTS, strict=True))
    records = [Record(Candidate(i, GENOME, text, parent, {}), o) for i, (text, o, parent) in rows]
    again = {1: Outcome("ok", scores=(0.99, 0.98)), 2: Outcome("time")}
    return Archive(how, tuple(records), {}, again)


def table(archive):
    return list(csv.DictReader(io.StringIO(hall_of_fame(archive), newline="")))


# --- CSV ------------------------------------------------------------------------------------------


def test_the_hall_of_fame_has_every_survivor_the_best_first():
    rows = table(made())
    assert list(rows[0]) == [
        "formula", "number", "parent", "front", "accuracy resnet", "accuracy mobilenet",
        "re-ranked accuracy resnet", "re-ranked accuracy mobilenet", "generation", "seconds",
    ]  # fmt: skip
    assert [row["number"] for row in rows] == ["1", "2", "0"]
    assert [row["front"] for row in rows] == ["yes", "yes", "no"]
    assert [row["parent"] for row in rows] == ["0", "1", ""]
    assert [row["generation"] for row in rows] == ["2", "3", "1"]
    assert [row["re-ranked accuracy resnet"] for row in rows] == ["0.99", "", ""]
    assert [float(row["accuracy mobilenet"]) for row in rows] == [0.8, 0.95, 0.6]
    assert rows[2]["seconds"] == "1.235"


def test_the_first_column_is_the_formula_to_the_letter():
    found = [row["formula"] for row in table(made())]
    assert found == [LAYERS[1], LAYERS[2], LAYERS[0]]
    assert all(normc.parse(text) for text in found)
    assert hall_of_fame(made()).splitlines()[1].startswith("-x*gamma + beta,1,0,yes,0.9,0.8,")


RUN = ["=1+1", "@SUM(A1)", "-2+cmd|' /C calc'!A0", '=HYPERLINK("x")', "-x  # cmd|' /C calc'!A0"]


@pytest.mark.parametrize("text", RUN)
def test_what_a_spreadsheet_could_run_is_not_written(text):
    run = made()
    first = replace(run.records[0], candidate=replace(run.records[0].candidate, text=text))
    with pytest.raises(NormcError):
        hall_of_fame(replace(run, records=(first, *run.records[1:])))
    header = hall_of_fame(Archive(Setting(objectives=(text,)), ()))
    assert next(csv.reader([header]))[4] == f"'{text}"


def test_a_run_without_survivors_has_a_header():
    assert hall_of_fame(Archive(Setting(), ())).count("\n") == 1


@pytest.mark.parametrize("wrong", [(0.5,), (0.5, float("inf"))])
def test_scores_have_to_be_those_of_the_setting(wrong, tmp_path):
    run = replace(made(), reranked={1: Outcome("ok", scores=wrong)})
    for export in (
        hall_of_fame,
        lambda run: to_tensorboard(run, tmp_path),
        lambda run: to_optuna(run, f"sqlite:///{tmp_path}/study.db", "run"),
    ):
        with pytest.raises(NormcError, match="candidate 1, re-ranked has the scores"):
            export(run)
    assert list(tmp_path.iterdir()) == []


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_reads_the_scores(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = made()
    to_tensorboard(run, tmp_path / "log")
    log = EventAccumulator(str(tmp_path / "log"))
    log.Reload()

    def read(name):
        return [(e.step, pytest.approx(e.value)) for e in log.Scalars(name)]

    assert read("scores/accuracy resnet") == [(1, 0.5), (2, 0.9), (3, 0.7)]
    assert read("best/accuracy resnet") == [(1, 0.5), (2, 0.9), (3, 0.9)]
    assert [value for _, value in read("run/survivors")] == [1, 2, 3, 3, 3]
    volumes = run.progress(run.records[:5], (0, 0))
    assert [value for _, value in read("run/hypervolume")] == volumes
    (front,) = (e.tensor_proto.string_val[0].decode() for e in log.Tensors("front/text_summary"))
    assert front.splitlines()[2] == "| 1 | 0.9 | 0.8 | `-x*gamma + beta` |"
    assert len(front.splitlines()) == 4


def test_a_log_is_not_mixed_with_another(tmp_path):
    pytest.importorskip("tensorboard")
    to_tensorboard(made(), tmp_path)
    with pytest.raises(NormcError, match="a log of TensorBoard already"):
        to_tensorboard(made(), tmp_path)


# --- Optuna ---------------------------------------------------------------------------------------


def test_optuna_reads_the_study(tmp_path):
    optuna = pytest.importorskip("optuna")
    run, url = made(), f"sqlite:///{tmp_path}/study.db"
    to_optuna(run, url, "run")
    study = optuna.load_study(storage=url, study_name="run")
    assert [t.state.name for t in study.trials] == [
        "COMPLETE", "COMPLETE", "COMPLETE", "PRUNED", "FAIL", "WAITING",
    ]  # fmt: skip
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MAXIMIZE"]
    assert [t.number for t in study.best_trials] == [1, 2]
    assert {t.number for t in study.best_trials} == {r.candidate.number for r in run.best}
    assert [tuple(t.values) for t in study.trials[:3]] == [scores(r) for r in run.scored]
    assert study.metric_names == list(run.names)
    assert study.trials[1].user_attrs["formula"] == LAYERS[1]
    assert [t.user_attrs["parent"] for t in study.trials] == list(PARENTS)
    assert study.trials[4].user_attrs | {"formula": ""} == {
        "formula": "", "parent": 2, "status": "crash", "reason": "signal 11", "seconds": 0.0,
    }  # fmt: skip
    assert Setting.from_json(study.user_attrs["setting"]) == run.setting
    assert max(study.best_trials, key=lambda t: mean(t.values)).number == 1


def test_a_study_is_not_mixed_with_another(tmp_path):
    pytest.importorskip("optuna")
    url = f"sqlite:///{tmp_path}/study.db"
    to_optuna(made(), url, "run")
    with pytest.raises(NormcError, match="cannot write the study 'run': .*exists"):
        to_optuna(made(), url, "run")
    to_optuna(made(), url, "another")


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////no/such/folder/study.db", "nobase://me:secret@host/base"]
)
def test_a_storage_that_cannot_be_written_is_told_without_its_password(url):
    pytest.importorskip("optuna")
    with pytest.raises(NormcError, match="cannot write the study") as raised:
        to_optuna(made(), url, "run")
    assert "secret" not in str(raised.value)


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(NormcError, match="needs tensorboard: pip install"):
        to_tensorboard(made(), tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(NormcError, match="needs optuna: pip install"):
        to_optuna(made(), "sqlite:///", "run")
