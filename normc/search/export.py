"""Export: a run for other programs: a table as CSV, a log for TensorBoard, a study of Optuna."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from normc.errors import NormcError
from normc.formula import parse
from normc.search.archive import Archive, Record, mean, scores
from normc.search.outcome import Status
from normc.search.report.scores import check, origin

# --- CSV ------------------------------------------------------------------------------------------


def ranked(archive: Archive) -> list[Record]:
    """Every survivor, the best first: those on the front, then the others, each by the average."""
    best = archive.best
    ahead = {r.candidate.number for r in best}
    rest = [r for r in archive.scored if r.candidate.number not in ahead]
    return best + sorted(rest, key=lambda r: (-mean(scores(r)), r.candidate.number))


def hall_of_fame(archive: Archive) -> str:
    """Every survivor as CSV, the best first.

    The first column is the formula to the letter, also where it begins with a minus or has several
    lines: a mark in front of it, by which spreadsheets know text, would make it another one. So
    that nothing there can be run that a stranger's file contains, a text that is no formula, or has
    a comment, is an error: what is left has no strings and no functions but ours. A spreadsheet
    shows such cells as they are if the column is imported as text. Names of scores, which may be
    any text, get the mark if they need it.
    """
    check(archive)
    names = [_inert(name) for name in archive.names]
    again = [f"re-ranked {name}" for name in archive.names]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["formula", "number", "parent", "front", *names, *again, "generation", "seconds"]
    )
    front = {r.candidate.number for r in archive.best}
    for record in ranked(archive):
        table.writerow(_row(archive, record, record.candidate.number in front))
    return text.getvalue()


def _row(archive: Archive, record: Record, front: bool) -> list[Any]:
    assert record.outcome is not None
    one, outcome = record.candidate, record.outcome
    if "#" in parse(one.text).text:
        raise NormcError(f"candidate {one.number} has a comment in its formula: {one.text!r}")
    longer = archive.reranked.get(one.number)
    again = longer.told if longer else None
    return [
        one.text,
        one.number,
        "" if one.parent is None else one.parent,
        "yes" if front else "no",
        *outcome.scores,
        *(again or [""] * len(archive.names)),
        len(archive.lineage(one.number)),
        round(outcome.seconds, 3),
    ]


def _inert(name: str) -> str:
    """A text that no spreadsheet takes for something to compute."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else name


# --- TensorBoard ----------------------------------------------------------------------------------


def to_tensorboard(archive: Archive, folder: Path) -> None:
    """A log that `tensorboard --logdir` reads; a step is an evaluation.

    The scores of each survivor, the best of each so far, the hypervolume, how many survived; the
    front as a table, and the setting. Raises `NormcError` without tensorboard, and for a folder
    that has a log already, of which the new one would become a part.
    """
    check(archive)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise NormcError(
            "this export needs tensorboard: pip install 'normc[tensorboard]'"
        ) from None
    if any(folder.glob("events.out.tfevents.*")):
        raise NormcError(f"there is a log of TensorBoard already: {folder}")
    with SummaryWriter(str(folder)) as log:
        for name, value, step in _scalars(archive):
            log.add_scalar(name, value, step)
        log.add_text("front", _table(archive))
        log.add_text("setting", _verbatim(archive.setting.to_json()))


def _scalars(archive: Archive) -> Iterator[tuple[str, float, int]]:
    """Names, values and steps."""
    best: dict[str, float] = {}
    survivors = 0
    done = [r for r in archive.records if r.outcome]
    volumes = archive.progress(done, origin([archive]))
    for step, (record, volume) in enumerate(zip(done, volumes, strict=True), 1):
        if record.sound:
            survivors += 1
            for name, value in zip(archive.names, scores(record), strict=True):
                best[name] = max(value, best.get(name, value))
                yield f"scores/{name}", value, step
                yield f"best/{name}", best[name], step
        yield "run/hypervolume", volume, step
        yield "run/survivors", survivors, step


def _table(archive: Archive) -> str:
    """The front in Markdown, formulas as code."""
    heads = ["number", *archive.names, "formula"]
    lines = [_line(heads), _line("---" for _ in heads)]
    for record in archive.best:
        numbers = [f"{value:.4g}" for value in scores(record)]
        text = record.candidate.text.replace("\n", "; ").replace("`", "'").replace("|", "\\|")
        lines.append(_line([str(record.candidate.number), *numbers, f"`{text}`"]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _verbatim(text: str) -> str:
    """A text in Markdown that is shown as it is: lines with four spaces before them."""
    return "\n".join(f"    {line}" for line in text.splitlines())


# --- Optuna ---------------------------------------------------------------------------------------


def to_optuna(archive: Archive, url: str, name: str) -> None:
    """A study of Optuna in a storage such as ``sqlite:///study.db``: all scores are maximized.

    Trial i is candidate i: with scores it is complete, pruned if quality or stability rejected it,
    waiting if it has no outcome yet, and otherwise failed. Formula, parent, status, reason and
    seconds are its user attributes. Raises `NormcError` without optuna, for a storage that cannot
    be written, and for a study that exists.
    """
    check(archive)
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise NormcError("this export needs optuna: pip install 'normc[optuna]'") from None
    trials = [_trial(record) for record in archive.records]
    try:
        storage = optuna.storages.get_storage(url)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[optuna.study.StudyDirection.MAXIMIZE] * len(archive.names),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(archive.names))
        study.set_user_attr("setting", archive.setting.to_json())
        study.add_trials(trials)
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
        # Of the storage's name nothing is repeated: it may hold a password.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NormcError(f"cannot write the study {name!r}: {reason}") from error


def _trial(record: Record) -> Any:
    from optuna.trial import TrialState, create_trial

    one, outcome = record.candidate, record.outcome
    attributes: dict[str, Any] = {"formula": one.text, "parent": one.parent}
    if outcome is None:
        return create_trial(state=TrialState.WAITING, user_attrs=attributes)
    attributes |= {"status": outcome.status, "reason": outcome.reason, "seconds": outcome.seconds}
    if outcome.told is not None:
        return create_trial(values=list(outcome.scores), user_attrs=attributes)
    rejected: tuple[Status, ...] = ("quality", "stability")
    state = TrialState.PRUNED if outcome.status in rejected else TrialState.FAIL
    return create_trial(state=state, user_attrs=attributes)
