"""Facts: what a report says of a run as a whole: what it did, rejected, and what went wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from normc.search.archive import Archive
from normc.search.evolve import Candidate
from normc.search.outcome import STATUSES, Status
from normc.search.report.curves import bar
from normc.search.report.scores import number, seconds, share
from normc.search.screen import STAGES
from normc.search.setting import Setting

MOST_FAULTS, MOST_EXAMPLES = 50, 10
"""How many reasons are listed, and how many candidates for each."""

FAULTS: tuple[Status, ...] = ("failed", "time", "memory", "crash", "diverged")
"""Outcomes that are worth a look: they say something about the code, or about limits."""

STAGE_WORDS = {
    "blind": "does not read x, once dead nodes are gone",
    "series": "a statistic crosses samples, which series S excludes",
    "form": "the same expression as a layer that passed",
    "value": "not finite on random input",
    "constant": "the same value everywhere, whatever x is",
    "duplicate": "equal in value to a layer that passed",
    "gradient": "no gradient for x, or one that is not finite",
}
STATUS_WORDS = {
    "quality": "accuracy below the threshold after the first steps",
    "stability": "weights can be found for which gradients explode",
    "diverged": "a loss or a score that is not finite, later on",
    "failed": "an error while it was evaluated",
    "time": "took longer than the limit",
    "memory": "wanted more memory than the limit",
    "crash": "its process died",
}


@dataclass(frozen=True)
class Stage:
    """A stage of a funnel: what ended there."""

    name: str
    meaning: str
    count: str
    share: str
    bar: Markup
    last: bool = False  # what came through all of them


@dataclass(frozen=True)
class Fault:
    """A reason for which something went wrong, and the candidates that it went wrong with."""

    status: str
    reason: str
    examples: list[Candidate]  # the first of them
    count: int


def sentence(archive: Archive) -> str:
    """The setting of a run, in words."""
    how, done = archive.setting, sum(archive.statuses().values())
    way = "Evolution" if how.evolution.strategy == "evolution" else "Random search"
    series = {"B": "statistics may cross samples", "S": "no statistic crosses samples"}
    nets = how.architectures
    each = "a small network" if len(nets) == 1 else f"{len(nets)} small networks"
    return (
        f"{way} of normalization-activation layers, series {how.evolution.series} "
        f"({series[how.evolution.series]}), seed {how.evolution.seed}. {number(done)} "
        f"{'candidate was' if done == 1 else 'candidates were'} evaluated on {data_name(how)}, "
        f"in {each} ({_listed(nets)}) trained for {how.recipe.steps} steps of "
        f"{how.recipe.batch} images."
    )


def data_name(how: Setting) -> str:
    """What a run was evaluated on, without the folder that it was read from."""
    kind, _, place = how.data.partition(":")
    return f"data of its own ({place[:8]})" if kind == "given" else kind


def _listed(words: tuple[str, ...]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def figures(archive: Archive) -> list[tuple[str, str]]:
    """The key numbers of a run, with what they are of."""
    done = [r.outcome for r in archive.records if r.outcome]
    found = [
        (number(archive.screened()["screened"]), "graphs screened"),
        (number(len(done)), "candidates evaluated"),
        (number(len(archive.scored)), "survivors"),
        (number(len(archive.best)), "on the Pareto front"),
        (seconds(sum(o.seconds for o in done)), "of evaluation"),
    ]
    waiting = len(archive.records) - len(done)
    return [*found, (number(waiting), "still to be evaluated")] if waiting else found


# --- funnels --------------------------------------------------------------------------------------


def screening(archive: Archive) -> list[Stage]:
    """Graphs, by the stage that rejected them before anything was trained."""
    counts = archive.screened()
    rows = [(name, STAGE_WORDS.get(name, ""), counts[name]) for name in STAGES]
    return _funnel(rows, counts["screened"], ("passed", "a new layer: a candidate"))


def evaluation(archive: Archive) -> list[Stage]:
    """Candidates, by what ended their evaluation."""
    counts = archive.statuses()
    names = [name for name in STATUSES if name != "ok"]
    rows = [(name, STATUS_WORDS.get(name, ""), counts[name]) for name in names]
    return _funnel(rows, sum(counts.values()), ("survivors", "have scores"))


def _funnel(rows: list[tuple[str, str, int]], whole: int, last: tuple[str, str]) -> list[Stage]:
    found: list[Stage] = []
    left = whole
    for name, meaning, count in rows:
        row = bar(left, left - count, whole)
        found.append(Stage(name, meaning, number(count), share(count, whole), row))
        left -= count
    return [*found, Stage(*last, number(left), share(left, whole), bar(left, left, whole), True)]


# --- faults, versions, setting --------------------------------------------------------------------


def faults(archive: Archive) -> list[Fault]:
    """What went wrong, equal reasons together, in the order in which they were met first."""
    found: dict[tuple[str, str], list[Candidate]] = {}
    for record in archive.records:
        if record.outcome and record.outcome.status in FAULTS:
            reason = record.outcome.status, record.outcome.reason
            found.setdefault(reason, []).append(record.candidate)
    return [Fault(*reason, who[:MOST_EXAMPLES], len(who)) for reason, who in found.items()]


def noted(notes: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a run has noted, but for its setting, which is shown on its own."""
    return [(key, value) for key, value in notes.items() if key not in ("setting", "budget")]


def setting_text(archive: Archive) -> str:
    """All of the setting, as a file that another run can be started with."""
    return json.dumps(json.loads(archive.setting.to_json()), indent=2, ensure_ascii=False)
