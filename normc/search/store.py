"""Store: a run in one SQLite file, in which nothing that was told is ever lost.

    run         the setting, the versions it was made with
    candidate   number, graph, formula, parent, graphs screened to find it
    outcome     number, status, scores, measures, seconds
    reference   the outcomes of known layers under the same setting
    reranked    outcomes under a longer schedule

Each row is committed, to the disk, before anything is reported of it, and carries a digest of its
content, so that a changed bit is noticed. A file from a stranger is safe to open: numbers and text
are all there is, the text is JSON, graphs of the space, and formulas that the parser reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from normc.errors import NormcError
from normc.language.parse import parse
from normc.search.archive import Archive, Record
from normc.search.evolve import Candidate
from normc.search.genome import formula, read
from normc.search.objectives import score_names
from normc.search.outcome import STATUSES, Outcome
from normc.search.screen import agree
from normc.search.setting import Setting
from normc.search.space import Space

NAME = "search.sqlite"
"""Of the file in a run's folder."""

VERSION = 1
"""Of the tables. A file of a later version is refused; one of an earlier is brought up to date."""

APPLICATION = 0x6E6F726D
"""What SQLite calls the kind of a file: "norm"."""

_OUTCOME = (
    "status TEXT NOT NULL, reason TEXT NOT NULL, scores TEXT NOT NULL, measures TEXT NOT NULL"
)
TABLES = f"""
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL, digest TEXT NOT NULL) STRICT;
CREATE TABLE candidate (
    number INTEGER PRIMARY KEY, graph TEXT NOT NULL, formula TEXT NOT NULL, parent INTEGER,
    screened TEXT NOT NULL, digest TEXT NOT NULL
) STRICT;
CREATE TABLE outcome (
    number INTEGER PRIMARY KEY REFERENCES candidate, {_OUTCOME}, seconds REAL NOT NULL,
    digest TEXT NOT NULL
) STRICT;
CREATE TABLE reranked (
    number INTEGER PRIMARY KEY REFERENCES candidate, {_OUTCOME}, seconds REAL NOT NULL,
    digest TEXT NOT NULL
) STRICT;
CREATE TABLE reference (
    name TEXT PRIMARY KEY, {_OUTCOME}, seconds REAL NOT NULL, digest TEXT NOT NULL
) STRICT;
"""


class Store:
    """The file of a run, open. Raises `NormcError` for what is no run, or a damaged one."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.connection = connection

    @staticmethod
    def create(path: Path, setting: Setting, notes: Mapping[str, str]) -> Store:
        """A new file; it has its tables and its setting, or it does not exist."""
        if path.exists():
            raise NormcError(f"there is a run already: {path}")
        # A run that is killed while its file is made leaves none: the name is given at the end.
        room = path.with_name(f"{path.name}.new")
        for rest in room.parent.glob(f"{room.name}*"):
            rest.unlink()
        connection = _opened(room)
        store = Store(room, connection)
        with closing(connection):
            store._settle()
            connection.executescript(TABLES)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            for key, value in {"setting": setting.to_json(), **notes}.items():
                store.note(key, value)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        room.rename(path)
        return Store.open(path)

    @staticmethod
    def open(path: Path) -> Store:
        """An existing file, checked as far as SQLite can."""
        if not path.is_file():
            raise NormcError(f"there is no run in {path.parent}: {path.name} is missing")
        store = Store(path, _opened(path))
        try:
            store._check()
            store._settle()
        except NormcError:
            store.close()
            raise
        return store

    def _check(self) -> None:
        """Raise `NormcError` unless the file is whole, and a search's; it stays as it is."""
        with _readable(self.path):
            application = self._pragma("application_id")
            version = self._pragma("user_version")
            state = self._pragma("quick_check")
        if application != APPLICATION:
            raise NormcError(f"{self.path} is not the file of a search")
        if not isinstance(version, int) or version > VERSION:
            raise NormcError(f"{self.path} is of version {version}, this normc reads {VERSION}")
        if state != "ok":
            raise NormcError(f"{self.path} is damaged: {state}")

    def _settle(self) -> None:
        """Have what is written from now on be on the disk when a statement ends."""
        with _readable(self.path):
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    # --- writing -------------------------------------------------------------------------------

    def note(self, key: str, value: str) -> None:
        """Something about the run as a whole."""
        self._insert("run", key, value)

    def add(self, candidate: Candidate) -> None:
        """A candidate that is going to be evaluated."""
        screened = _json(dict(candidate.screened))
        c = candidate
        self._insert("candidate", c.number, c.genome.code, c.text, c.parent, screened)

    def tell(self, number: int, outcome: Outcome) -> None:
        """What became of it."""
        self._insert("outcome", number, *_row(outcome))

    def rerank(self, number: int, outcome: Outcome) -> None:
        """What became of it under the longer schedule."""
        self._insert("reranked", number, *_row(outcome))

    def refer(self, name: str, outcome: Outcome) -> None:
        """What became of a known layer."""
        self._insert("reference", name, *_row(outcome))

    def _insert(self, table: str, *values: Any) -> None:
        marks = ", ".join("?" * (len(values) + 1))
        try:
            self.connection.execute(
                f"INSERT INTO {table} VALUES ({marks})", (*values, _digest(table, values))
            )
        except sqlite3.Error as error:
            if "UNIQUE" in str(error):
                raise NormcError(f"{table} {values[0]} is in the run already") from error
            raise NormcError(f"cannot write {self.path}: {error}") from error

    # --- reading -------------------------------------------------------------------------------

    def notes(self) -> dict[str, str]:
        """All that is noted of the run as a whole."""
        return {str(key): str(value) for key, value in self._rows("run")}

    def setting(self) -> Setting:
        """The setting of the run."""
        found = self.notes().get("setting")
        if found is None:
            raise NormcError(f"{self.path} has no setting")
        return Setting.from_json(found)

    def archive(self) -> Archive:
        """All of the run; every row is checked, every formula parsed."""
        setting = self.setting()
        count = len(score_names(setting))
        outcomes, reranked, references = (
            {row[0]: self._outcome(table, row, count) for row in self._rows(table)}
            for table in ("outcome", "reranked", "reference")
        )
        records: list[Record] = []
        for number, row in enumerate(self._rows("candidate")):
            if row[0] != number:
                raise NormcError(f"{self.path} is damaged: candidate {number} is missing")
            with _sound(self.path, f"candidate {number}"):
                found = _candidate(row, setting.space)
            records.append(Record(found, outcomes.pop(number, None)))
        strange = [*outcomes, *(number for number in reranked if number >= len(records))]
        if strange:
            raise NormcError(f"{self.path} is damaged: there is no candidate {min(strange)}")
        return Archive(setting, tuple(records), references, reranked)

    def _outcome(self, table: str, row: tuple[Any, ...], count: int) -> Outcome:
        """The outcome of a row that begins with its key; it has that many scores, or none."""
        with _sound(self.path, f"{table} {row[0]}"):
            found = _outcome(row[1:])
            if len(found.scores) != (count if found.status == "ok" else 0):
                raise NormcError(f"{len(found.scores)} scores for a setting with {count}")
            if not all(map(math.isfinite, found.scores)):
                raise NormcError("a score is not finite")
            return found

    def _rows(self, table: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a table in order of their key, without their digests, which are compared."""
        with _readable(self.path):
            rows = self.connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
        for *values, digest in rows:
            if digest != _digest(table, values):
                raise NormcError(f"{self.path} is damaged: {table} {values[0]} was changed")
            yield tuple(values)

    def _pragma(self, name: str) -> Any:
        return self.connection.execute(f"PRAGMA {name}").fetchone()[0]


def _opened(path: Path) -> sqlite3.Connection:
    """A connection whose statements are transactions of their own; it changes nothing yet."""
    with _readable(path):
        connection = sqlite3.connect(path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


@contextmanager
def _readable(path: Path) -> Generator[None]:
    try:
        yield
    except (sqlite3.Error, UnicodeError) as error:
        raise NormcError(f"cannot read {path}: {error}") from error


@contextmanager
def _sound(path: Path, what: str) -> Generator[None]:
    """Whatever a row makes of those that read it is an error of the file's."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        raise NormcError(f"{path} is damaged: {what}: {e}") from e


# --- rows -----------------------------------------------------------------------------------------


def _digest(table: str, values: Any) -> str:
    return hashlib.sha256(_json([table, *values]).encode()).hexdigest()[:32]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _row(outcome: Outcome) -> tuple[Any, ...]:
    o = outcome
    reason = o.reason.encode("utf-8", "replace").decode()  # a file's name may be no text
    return o.status, reason, _json(o.scores), _json(dict(o.measures)), float(o.seconds)


def _outcome(row: tuple[Any, ...]) -> Outcome:
    status, reason, scores, measures, seconds = row
    if status not in STATUSES:
        raise NormcError(f"no outcome is called {status!r}")
    found = {str(name): float(value) for name, value in json.loads(measures).items()}
    return Outcome(status, reason, tuple(map(float, json.loads(scores))), found, seconds)


def _candidate(row: tuple[Any, ...], space: Space) -> Candidate:
    """The candidate of a row; its formula has to be that of its graph, simplified or not."""
    number, graph, text, parent, screened = row
    genome = read(graph, space)
    if not agree(parse(text), parse(formula(genome.expr(space), space)), space):
        raise NormcError(f"{text!r} is not the formula of its graph")
    if parent is not None and not 0 <= parent < number:
        raise NormcError(f"candidate {number} cannot descend from {parent}")
    counts = {str(name): int(count) for name, count in json.loads(screened).items()}
    return Candidate(number, genome, text, parent, counts)
