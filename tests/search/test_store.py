"""Store: what went in comes out, what was told is kept, and what was changed is noticed."""

import hashlib
import json
import math
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from normc.errors import NormcError
from normc.search import store as module
from normc.search.archive import Archive
from normc.search.evolve import Candidate, Evolution, Study
from normc.search.genome import Genome, Node
from normc.search.outcome import STATUSES, Outcome
from normc.search.setting import Recipe, Setting
from normc.search.space import EVONORM, Space
from normc.search.store import NAME, Store

NAMES = ("ADD", "MUL", "DIV", "TANH", "MAX", "batch_std")
SPACE = Space({name: EVONORM.operations[name] for name in NAMES}, nodes=4)  # is read fast
SETTING = Setting(Evolution(seed=7, population=4), SPACE, recipe=Recipe(steps=120))


def found(number):
    """An outcome: of each status in turn, every other with scores."""
    if number % 2:
        status = STATUSES[number % len(STATUSES)]
        return Outcome(status, f"résumé of {number}: 'x\";\n--", (), {"norm": math.inf}, 0.5)
    scores = (number / 7, 1e-300, -0.1)
    return Outcome("ok", "", scores, {"quality resnet": 1 / 3, "a": -0.0}, 1.5 + number)


def asked(count):
    study = Study(SETTING.evolution, SPACE)
    for number in range(count):
        study.ask()
        study.tell(number, found(number).told)
    return study.candidates


CANDIDATES = asked(12)


def filled(folder, told=10):
    """A run with everything in it; the last two candidates are still to be told."""
    path = folder / NAME
    with closing(Store.create(path, SETTING, {"torch": "2.12", "note": "ü"})) as store:
        for candidate in CANDIDATES:
            store.add(candidate)
        for number in reversed(range(told)):
            store.tell(number, found(number))
        store.refer("BatchNorm + ReLU", found(0))
        store.refer("it's", found(1))
        store.rerank(4, found(6))
    return path


def read(path):
    with closing(Store.open(path)) as store:
        return store.archive(), store.notes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = filled(tmp_path_factory.mktemp("run"))
    return path, read(path)


def test_everything_comes_back(whole):
    archive, notes = whole[1]
    assert archive.setting == SETTING
    assert [r.candidate for r in archive.records] == CANDIDATES
    assert any(c.parent is not None for c in CANDIDATES)
    assert [r.outcome for r in archive.records] == [*map(found, range(10)), None, None]
    assert archive.references == {"BatchNorm + ReLU": found(0), "it's": found(1)}
    assert archive.reranked == {4: found(6)}
    assert notes == {"setting": SETTING.to_json(), "torch": "2.12", "note": "ü"}
    assert archive.statuses().total() == 10 and len(archive.scored) == 5


def test_another_space_comes_back(tmp_path):
    space = Space({"SIN": "sin(a)", "CLIP": "clamp(a, -1, b)"}, ("x", "alpha"), nodes=3)
    setting = Setting(space=space)
    genome = Genome((Node("SIN", (0,)), Node("CLIP", (2, 1))))
    one = Candidate(0, genome, "clamp(sin(x), -1, alpha)*gamma + beta", None, {})
    with closing(Store.create(tmp_path / NAME, setting, {})) as store:
        store.add(one)
        assert store.archive().records[0].candidate == one
        assert store.setting() == setting


def test_nothing_is_written_twice(tmp_path):
    with closing(Store.open(filled(tmp_path))) as store:
        before = store.archive()
        for write in (
            lambda: store.add(CANDIDATES[0]),
            lambda: store.tell(0, found(2)),
            lambda: store.rerank(4, found(2)),
            lambda: store.refer("it's", found(2)),
            lambda: store.note("torch", "3"),
        ):
            with pytest.raises(NormcError, match="is in the run already"):
                write()
        assert store.archive() == before


def test_an_outcome_needs_its_candidate(tmp_path):
    with closing(Store.open(filled(tmp_path))) as store:
        for write in (store.tell, store.rerank):
            with pytest.raises(NormcError):
                write(12, found(0))
        assert store.archive() == read(store.path)[0]


def test_what_cannot_be_written_says_why(tmp_path):
    with closing(Store.open(filled(tmp_path))) as store:
        for number, outcome in ((12, found(0)), (11, Outcome("ok", seconds=math.nan))):
            with pytest.raises(NormcError, match="^(?!.*in the run already)"):
                store.tell(number, outcome)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome("ok", scores=(1, 0, True), measures={"a": 3}, seconds=2.0),
        Outcome("quality", seconds=2),
        Outcome("failed", "no file is called \udcff"),
        Outcome("failed", "a zero: \0, a beard: \U0001f9d4, nothing: "),
    ],
    ids=["integers", "whole seconds", "surrogate", "strange text"],
)
def test_what_was_written_can_be_read(tmp_path, outcome):
    path = filled(tmp_path)
    with closing(Store.open(path)) as store:
        store.tell(11, outcome)
    back = read(path)[0].records[11].outcome
    assert back == outcome or back.reason.startswith("no file is called")


# --- files that are none --------------------------------------------------------------------------


def test_a_run_is_not_made_twice(tmp_path):
    path = filled(tmp_path)
    before = path.read_bytes()
    with pytest.raises(NormcError, match="there is a run already"):
        Store.create(path, Setting(), {})
    assert path.read_bytes() == before


def test_what_is_left_of_a_killed_beginning_is_no_run(tmp_path):
    for end in (".new", ".new-wal", ".new-shm", ".new-journal"):
        (tmp_path / f"{NAME}{end}").write_bytes(b"half")
    with pytest.raises(NormcError, match="there is no run in"):
        Store.open(tmp_path / NAME)
    archive, _ = read(filled(tmp_path))
    assert len(archive.records) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME]


def strange(path, kind):
    if kind == "version":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 2")
    elif kind == "application":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA application_id = 1")
    elif kind == "foreign":
        path.unlink()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE candidate (number)")
    else:
        path.write_bytes({"empty": b"", "text": b"a,b,c\n" * 1000}[kind])


REFUSED = {
    "version": "is of version 2, this normc reads 1",
    "application": "is not the file of a search",
    "foreign": "is not the file of a search",
    "empty": "is not the file of a search",
    "text": "cannot read",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_file_is_refused(tmp_path, kind):
    path = filled(tmp_path)
    strange(path, kind)
    with pytest.raises(NormcError, match=REFUSED[kind]):
        Store.open(path)


@pytest.mark.parametrize(
    "kind",
    [
        "version",
        "application",
        "text",
        *(k for k in ("foreign", "empty")),
    ],
)
def test_a_file_that_is_refused_stays_as_it_was(tmp_path, kind):
    path = filled(tmp_path)
    strange(path, kind)
    before = path.read_bytes()
    with pytest.raises(NormcError):
        Store.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_refused_is_let_go(tmp_path, kind, monkeypatch):
    path, made = filled(tmp_path), []
    strange(path, kind)

    class Kept(sqlite3.Connection):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            made.append(self)

    connect = sqlite3.connect
    monkeypatch.setattr(
        module.sqlite3,
        "connect",
        lambda *given, **options: connect(*given, factory=Kept, **options),
    )
    with pytest.raises(NormcError):
        Store.open(path)
    (connection,) = made
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        connection.execute("SELECT 1")


# --- damage ---------------------------------------------------------------------------------------


def outcome_of(path):
    """What a reader gets: the archive and the notes, or None if it is told of damage."""
    try:
        return read(path)
    except NormcError:
        return None


def put(path, data):
    """A new file in place of one that was there."""
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    path.write_bytes(data)


def test_a_changed_name_of_a_column_is_noticed(whole, tmp_path):
    data = bytearray(whole[0].read_bytes())
    data[data.index(b"reason TEXT")] ^= 0x80
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(NormcError):
        read(tmp_path / NAME)


def test_a_changed_bit_is_noticed_or_harmless(whole, tmp_path):
    path, right = whole
    data, chance, noticed = path.read_bytes(), random.Random(0), 0
    copy = tmp_path / NAME
    places = {*range(100), *chance.sample(range(100, len(data)), 120)}  # all of the header
    for place in sorted(places):
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        put(copy, changed)
        back = outcome_of(copy)
        assert back in (None, right), place
        noticed += back is None
    assert 40 < noticed < len(places)  # most of a small file is room that is not used yet


def test_every_bit_of_a_row_is_noticed(whole, tmp_path):
    """The rows of one outcome and one candidate, wherever they lie, bit after bit."""
    path, right = whole
    data, copy = path.read_bytes(), tmp_path / NAME
    for word in (b"quality resnet", CANDIDATES[3].genome.code.encode(), b"r\xc3\xa9sum\xc3\xa9"):
        start = data.index(word)
        for bit in range(8 * len(word)):
            changed = bytearray(data)
            changed[start + bit // 8] ^= 1 << bit % 8
            put(copy, changed)
            assert outcome_of(copy) is None, (word, bit)
    assert read(path) == right


def prefix(archive, right):
    """Whether an archive is what the other was at some moment."""
    told = [r.outcome for r in archive.records]
    return archive.setting == right.setting and all(
        a.candidate == b.candidate and t in (None, b.outcome)
        for a, b, t in zip(archive.records, right.records, told, strict=False)
    )


def test_a_truncated_file_is_noticed(whole, tmp_path):
    path, right = whole
    data, chance = path.read_bytes(), random.Random(1)
    copy, sizes = tmp_path / NAME, {0, 1, 99, 100, 101, 4095, 4096, 4097, len(data) - 1}
    for size in sorted(sizes | {chance.randrange(len(data)) for _ in range(40)}):
        put(copy, data[:size])
        assert outcome_of(copy) in (None, right), size


def test_a_truncated_log_gives_what_was_at_some_moment(tmp_path):
    """What a crash of the machine may leave of the file beside the database."""
    path, copy = tmp_path / NAME, tmp_path / "copy" / NAME
    copy.parent.mkdir()
    log = path.with_name(f"{NAME}-wal")
    with closing(Store.create(path, SETTING, {})) as store:
        for candidate in CANDIDATES[:6]:
            store.add(candidate)
            store.tell(candidate.number, found(candidate.number))
        right = store.archive()
        database, data = path.read_bytes(), log.read_bytes()
    counts, chance = set(), random.Random(2)
    for size in sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(40))}):
        put(copy, database)
        copy.with_name(log.name).write_bytes(data[:size])
        back = outcome_of(copy)
        if back is not None:
            assert prefix(back[0], right)
            counts.add(len(back[0].records))
    assert {0, 6} <= counts and len(counts) > 3


# --- files from a stranger ------------------------------------------------------------------------


def forge(path, table, *values):
    """Write a row past the store, with a digest that is right."""
    text = json.dumps([table, *values], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    marks = ", ".join("?" * (len(values) + 1))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*values, digest))


TANH = "tanh(x)*gamma + beta"


def test_a_row_by_hand_can_be_read(tmp_path):
    """Or the next test would say nothing."""
    path = filled(tmp_path)
    forge(path, "candidate", 12, "TANH:0", TANH, 3, '{"blind":2}')
    forge(path, "outcome", 12, "ok", "", "[1,2.5,3]", '{"a":1}', 0.5)
    record = read(path)[0].records[12]
    genome = Genome((Node("TANH", (0,)),))
    assert record.candidate == Candidate(12, genome, TANH, 3, {"blind": 2})
    assert record.outcome == Outcome("ok", "", (1, 2.5, 3), {"a": 1}, 0.5)


@pytest.mark.parametrize(
    "row",
    [
        ("candidate", 12, "TANH:0", "tanh(x", None, "{}"),
        ("candidate", 12, "TANH:0", "__import__('os').system('true')", None, "{}"),
        ("candidate", 12, "TANH:0", "", None, "{}"),
        ("candidate", 12, "TANH:0", "x" + "+x" * 100_000, None, "{}"),
        ("candidate", 12, "TANH:0", "(" * 50_000, None, "{}"),
        ("candidate", 12, "__import__('os'):0", TANH, None, "{}"),
        ("candidate", 12, "SIGMOID:0", TANH, None, "{}"),
        ("candidate", 12, "TANH:4", TANH, None, "{}"),
        ("candidate", 12, "", TANH, None, "{}"),
        ("candidate", 12, "TANH:0", TANH, 12, "{}"),
        ("candidate", 12, "TANH:0", TANH, -1, "{}"),
        ("candidate", 3, "TANH:0", TANH, 4, "{}"),
        ("candidate", 13, "TANH:0", TANH, None, "{}"),
        ("candidate", -1, "TANH:0", TANH, None, "{}"),
        ("outcome", 12, "ok", "", "[1,2,3]", "{}", 0.5),
        ("outcome", 11, "fine", "", "[]", "{}", 0.5),
        ("run", "setting", '{"colour": 1}'),
        ("run", "setting", '{"space": {"operations": {"NEG": "-a; import os"}}}'),
        ("candidate", 12, "TANH:0",
               "sigmoid(x)*gamma + beta", None, "{}"),
        ("candidate", 12, "TANH:" + "1" * 5000, TANH, None, "{}"),
        ("candidate", 12, "TANH:0", TANH, None, "no JSON"),
        ("candidate", 12, "TANH:0", TANH, None, "[1]"),
        ("candidate", 12, "TANH:0", TANH, None, '{"blind":[]}'),
        ("outcome", 11, "ok", "", "no JSON", "{}", 0.5),
        ("outcome", 11, "ok", "", '{"a":1}', "{}", 0.5),
        ("outcome", 11, "ok", "", "[1,2,3]", "[" * 100_000, 0.5),
        ("outcome", 11, "ok", "", "[1,2,3]", '{"a":{}}', 0.5),
        ("outcome", 11, "ok", "", "[1]", "{}", 0.5),
        ("outcome", 11, "ok", "", "[NaN,1,1]", "{}", 0.5),
        ("reranked", 99, "ok", "", "[1,2,3]", "{}", 0.5),
    ],
    ids=lambda row: " ".join(str(v)[:14] for v in row),
)  # fmt: skip
def test_a_row_by_hand_is_looked_at(tmp_path, row):
    path = filled(tmp_path)
    forge(path, *row)
    with pytest.raises(NormcError):
        read(path)


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE outcome",
        "DELETE FROM run WHERE key = 'setting'",
        "DELETE FROM candidate WHERE number = 5",
        "UPDATE candidate SET formula = replace(formula, '*', '+')",
        "UPDATE outcome SET scores = '[1,1,1]' WHERE number = 2",
        "UPDATE outcome SET number = 11 WHERE number = 2",
        "UPDATE run SET value = '{}'",
        "UPDATE reference SET name = 'mine' WHERE name = 'it''s'",
    ],
)
def test_a_change_by_hand_is_noticed(tmp_path, change):
    path = filled(tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    with pytest.raises(NormcError):
        read(path)


# --- nothing is lost ------------------------------------------------------------------------------


def test_what_is_written_is_on_the_disk(tmp_path):
    with closing(Store.open(filled(tmp_path))) as store:
        asked = {
            name: store.connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys", "trusted_schema")
        }
        assert asked == {
            "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "trusted_schema": 0,
        }  # fmt: skip
        store.tell(10, found(10))
        assert not store.connection.in_transaction
        archive, _ = read(store.path)  # another reads while this one is open
        assert archive.records[10].outcome == found(10)


WRITER = """
import sys
from pathlib import Path
from normc.search.evolve import Candidate
from normc.search.genome import Genome, Node
from normc.search.outcome import Outcome
from normc.search.setting import Setting
from normc.search.store import Store

store = Store.create(Path(sys.argv[1]), Setting(), {})
for number in range(100_000):
    genome = Genome((Node("TANH", (0,)),))
    store.add(Candidate(number, genome, "tanh(x)*gamma + beta", None, {"blind": number}))
    store.tell(number, Outcome("ok", "", (number / 3, 1.0, 2.0), {}, 0.25))
    print(number, flush=True)
"""


def test_a_killed_process_loses_nothing_it_was_told(tmp_path):
    path = tmp_path / NAME
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        seen = [int(process.stdout.readline()) for _ in range(60)]
        process.send_signal(signal.SIGKILL)
        seen += [int(line) for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    left = shutil.copytree(tmp_path, tmp_path / "left") / NAME  # as it was when the process died
    archive, _ = read(left)
    assert isinstance(archive, Archive) and archive.setting == Setting()
    assert len(archive.records) in (len(seen), len(seen) + 1)
    for number, record in enumerate(archive.records[: len(seen)]):
        assert record.candidate.screened == {"blind": number}
        assert record.outcome == Outcome("ok", "", (number / 3, 1.0, 2.0), {}, 0.25)
    with closing(Store.open(path)) as store:  # and it goes on
        number = len(store.archive().records)
        store.add(Candidate(number, CANDIDATES[0].genome, CANDIDATES[0].text, None, {}))
        store.tell(number, found(0))
        assert store.archive().records[-1].outcome == found(0)
