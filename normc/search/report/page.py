"""Report: a run as one HTML page, to be read from a disk, sent to a colleague, or printed.

The page needs nothing else: style, script, charts and formulas are in it, and it asks for nothing
over the network. What a run contains is text, and stays text: the template escapes all of it, data
for the script are JSON, and the page tells the browser the digests of its own script and style, so
that nothing else would run. Without the script all of it can be read; the script adds tooltips,
sorting and copying.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from normc.errors import NormcError
from normc.search.archive import Archive, Record, scores
from normc.search.report import facts, layers
from normc.search.report.curves import Line, curves
from normc.search.report.scatter import Dot, Kind, panels, strip
from normc.search.report.scores import Score, check, known_layer, origin, score_list
from normc.search.report.svg import breakable

FOLDER = Path(__file__).parent

WIDE, NARROW = (1104, 380), (360, 300)
"""Sizes of a chart as wide as the page, and of the same on a phone."""


def page(
    archive: Archive,
    title: str,
    baseline: Archive | None = None,
    notes: Mapping[str, str] = {},
) -> str:
    """The whole page. A baseline is another run, of random search, whose progress is drawn as well.

    Notes are what a run has noted of itself, such as versions. Raises `NormcError` for a baseline
    that has other scores.
    """
    for run in filter(None, (archive, baseline)):
        check(run)
    if baseline is not None and baseline.names != archive.names:
        raise NormcError(
            f"the baseline has other scores: {', '.join(baseline.names)}, this run "
            f"{', '.join(archive.names)}"
        )
    style, script = _own("page.css"), _own("page.js")
    lines = _progress(archive, baseline)
    content = {
        "title": title,
        "style": style,
        "script": script,
        "policy": _policy(style, script),
        "measured": score_list(archive),
        "data": {"dots": _tips(archive), "lines": _plain(lines)},
        **_whole(archive, notes),
        **_charts(archive, lines),
        **_origin(archive, baseline),
    }
    return _template().render(content)


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    room.filters["breakable"] = breakable
    return room.get_template("page.html")


def _own(name: str) -> Markup:
    return Markup((FOLDER / name).read_text("utf-8"))


def _policy(style: str, script: str) -> str:
    """What the browser may use for this page: its own style and script, and nothing else."""
    digests = [base64.b64encode(hashlib.sha256(t.encode()).digest()) for t in (style, script)]
    first, second = (f"'sha256-{d.decode()}'" for d in digests)
    rest = "img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; style-src {first}; script-src {second}; {rest}"


# --- content --------------------------------------------------------------------------------------


def _whole(archive: Archive, notes: Mapping[str, str]) -> dict[str, Any]:
    """All but the charts."""
    every, rows = facts.faults(archive), layers.hall(archive)
    return {
        "sentence": facts.sentence(archive),
        "figures": facts.figures(archive),
        "screening": facts.screening(archive),
        "evaluation": facts.evaluation(archive),
        "winners": layers.winners(archive),
        "rows": rows,
        "best": next((row for row in rows if row.front), None),
        "has_known": any(row.number is None for row in rows),
        "listed": sum(row.number is not None for row in rows),
        "known": known_layer(archive.references),
        "again": any(cell.text for row in rows for cell in row.again),
        "average": layers.average(score_list(archive)),
        "survivors": len(archive.scored),
        "on_front": len(archive.best),
        "faults": every[: facts.MOST_FAULTS],
        "reasons": len(every),
        "fault_count": sum(fault.count for fault in every),
        "notes": facts.noted(notes),
        "setting": facts.setting_text(archive),
    }


def _charts(archive: Archive, lines: list[Line]) -> dict[str, Any]:
    """The pictures; single ones in two sizes, of which the page shows the one that fits."""
    found, dots = score_list(archive), _dots(archive)
    scatter: list[Markup] = []
    if dots and len(found) == 1:
        scatter = [strip(dots, found[0], width) for width, _ in (WIDE, NARROW)]
    elif dots:
        scatter = panels(dots, found)
    shown = any(line.values and line.values[-1] > 0 for line in lines)
    progress = [curves(lines, "hypervolume", size) for size in (WIDE, NARROW)] if shown else []
    return {"scatter": scatter, "progress": progress, "lines": lines}


def _origin(archive: Archive, baseline: Archive | None) -> dict[str, Any]:
    """What the caption of the progress says."""
    point = origin([a for a in (archive, baseline) if a])
    worst = [(s.name, s.text(v)) for s, v in zip(score_list(archive), point, strict=True)
             if not s.accuracy]  # fmt: skip
    same = baseline is None or archive.setting == replace(
        baseline.setting, evolution=archive.setting.evolution
    )
    return {"worst": worst, "has_baseline": baseline is not None, "same_setting": same}


def _progress(archive: Archive, baseline: Archive | None) -> list[Line]:
    """The hypervolume of the run, of its own random graphs, and of random search."""
    point = origin([a for a in (archive, baseline) if a])
    done = [r for r in archive.records if r.outcome]
    own = [r for r in done if r.candidate.parent is None]
    lines = [Line("this run", "run", archive.progress(done, point))]
    if baseline is not None:
        other = [r for r in baseline.records if r.outcome][: len(done)]
        random = baseline.setting.evolution.strategy == "random"
        label = "random search" if random else "baseline"
        lines.append(Line(label, "random", baseline.progress(other, point)))
    if len(own) < len(done):
        values = archive.progress(own, point)
        lines.append(Line("random graphs of this run, by themselves", "own", values))
    return lines


def _plain(lines: list[Line]) -> list[dict[str, Any]]:
    """Lines as the script reads them."""
    return [{"label": line.label, "values": [round(v, 6) for v in line.values]} for line in lines]


# --- points ---------------------------------------------------------------------------------------


def _dots(archive: Archive) -> list[Dot]:
    """Survivors and known layers."""
    found = score_list(archive)
    front = {r.candidate.number for r in archive.best}
    dots = [_dot(r, "front" if r.candidate.number in front else "pale", found)
            for r in archive.scored]  # fmt: skip
    for name, outcome in archive.references.items():
        if outcome.told is not None:
            title = f"{name}: {_said(outcome.scores, found)}"
            dots.append(Dot(f"known:{name}", "known", outcome.scores, title, name))
    return dots


def _dot(record: Record, kind: Kind, found: list[Score]) -> Dot:
    one, values = record.candidate, scores(record)
    title = f"No. {one.number}: {one.text}; {_said(values, found)}"
    return Dot(str(one.number), kind, values, title, str(one.number) if kind == "front" else "")


def _said(values: tuple[float, ...], found: list[Score]) -> str:
    return ", ".join(f"{s.name} {s.text(v)}{' %' * s.accuracy}"
                     for s, v in zip(found, values, strict=True))  # fmt: skip


def _tips(archive: Archive) -> dict[str, dict[str, Any]]:
    """What the tooltip says of each point."""
    found = score_list(archive)
    kinds = {"front": "on the front", "pale": "dominated", "known": "known layer"}
    tips: dict[str, dict[str, Any]] = {}
    for dot in _dots(archive):
        known = dot.kind == "known"
        tips[dot.key] = {
            "head": dot.label if known else f"No. {dot.key}",
            "kind": kinds[dot.kind],
            "formula": "" if known else archive.records[int(dot.key)].candidate.text,
            "scores": [[s.label, s.text(v)] for s, v in zip(found, dot.values, strict=True)],
        }
    return tips
