"""The page of a run: what it says, that text stays text, and what it does in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree.ElementTree import Element

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from normc.errors import NormcError
from normc.language.zoo import ZOO
from normc.search.archive import Archive, Record, scores
from normc.search.evolve import Evolution, Study
from normc.search.outcome import STATUSES, Outcome
from normc.search.report.formulas import rendered
from normc.search.report.layers import marked
from normc.search.report.page import page
from normc.search.report.scores import Score
from normc.search.report.svg import Axis, element, labels, ticks
from normc.search.screen import STAGES
from normc.search.setting import Setting

pytestmark = pytest.mark.plain

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
VOID = {"meta", "link", "wbr", "br", "img", "input"}


def invented(text, count):
    digest = hashlib.sha256(text.encode()).digest()
    return tuple(0.5 + b / 512 for b in digest[:count])


def made(evaluations=60, strategy="evolution", **setting):
    """A run whose scores are digests of formulas; of seven candidates two have none."""
    evolution = Evolution(seed=3, population=20, fresh=0.05, strategy=strategy)
    study, how = Study(evolution), Setting(evolution=evolution, **setting)
    count, records = len(Archive(how, ()).names), []
    for number in range(evaluations):
        one, outcome = study.ask(), Outcome("quality", "resnet has 0.1", seconds=1.0)
        if number % 7 == 1:
            outcome = Outcome("failed", HOSTILE, seconds=2.0)
        elif number % 7:
            outcome = Outcome("ok", scores=invented(one.text, count), seconds=3.0)
        study.tell(number, outcome.told)
        records.append(Record(one, outcome))
    known = {
        "BatchNorm + ReLU": Outcome("ok", scores=(0.7,) * count),
        HOSTILE: Outcome("ok", scores=(0.6,) * count),
        "EvoNorm-B0": Outcome("diverged", "no scores"),
    }
    best = Archive(how, tuple(records), known).best[:1]
    again = {r.candidate.number: Outcome("ok", scores=(0.8125,) * count) for r in best}
    return Archive(how, tuple(records), known, again)


class Seen(HTMLParser):
    """Tags and texts of a page, in which every element has to be closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text_of(self, tag):
        return [data for where, data in self.texts if where == tag]

    @property
    def data(self):
        return json.loads(self.text_of("script")[0])

    def dots(self, kind):
        return [a["data-key"] for _, a in self.tags if a.get("class") == f"dot {kind}"
                and "data-key" in a]  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return made()


@pytest.fixture(scope="module")
def text(run):
    return page(run, f"A run {HOSTILE}", notes={"torch": "2.11", "<b>": HOSTILE})


# --- what it is -----------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(text):
    seen = Seen(text)
    asked = [a.get("src") or a.get("href") for _, a in seen.tags]
    assert {a for a in asked if a and not a.startswith("#")} == {"data:,"}
    assert not re.search(r"https?://|@import|url\(", text)


def test_what_a_run_contains_stays_text(text):
    seen = Seen(text)
    names = [tag for tag, _ in seen.tags]
    assert "img" not in names and names.count("script") == 2 and "b>" not in names
    assert not any(name.startswith("on") for _, attrs in seen.tags for name in attrs)
    assert sum(HOSTILE in data for _, data in seen.texts) > 4  # title, note, reason, known layer
    assert f"known:{HOSTILE}" in seen.data["dots"]


def test_hostile_names_and_formulas_stay_text():
    run = made(20, objectives=(HOSTILE, "accuracy"))
    changed = [replace(r, candidate=replace(r.candidate, text=HOSTILE)) for r in run.records]
    seen = Seen(page(replace(run, records=tuple(changed)), "title"))
    names = [tag for tag, _ in seen.tags]
    assert "img" not in names and names.count("script") == 2 and "math" not in names


def test_the_policy_names_the_page_s_own_script_and_style(text):
    seen = Seen(text)
    (policy,) = [a["content"] for _, a in seen.tags if "http-equiv" in a]
    for tag in ("style", "script"):
        own = seen.text_of(tag)[-1]
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


# --- what it says ---------------------------------------------------------------------------------


def test_every_survivor_is_a_point_of_each_panel(run, text):
    seen = Seen(text)
    front = [str(r.candidate.number) for r in run.best]
    pale = {str(r.candidate.number) for r in run.scored} - set(front)
    assert sorted(seen.dots("front")) == sorted(front * 3)  # three accuracies: three pairs
    assert sorted(seen.dots("pale")) == sorted([*pale] * 3)
    assert set(seen.dots("known")) == {"known:BatchNorm + ReLU", f"known:{HOSTILE}"}
    assert sum(a.get("tabindex") == "0" and "data-key" in a for _, a in seen.tags) == 3


def test_progress_is_that_of_the_archive(run):
    baseline = made(80, "random")
    lines = Seen(page(run, "title", baseline)).data["lines"]
    own = [r for r in run.records if r.candidate.parent is None]
    assert 20 <= len(own) < 60
    wanted = {
        "this run": run.progress(run.records, (0, 0, 0)),
        "random search": baseline.progress(baseline.records[:60], (0, 0, 0)),
        "random graphs of this run, by themselves": run.progress(own, (0, 0, 0)),
    }
    assert [line["label"] for line in lines] == list(wanted)
    for line in lines:
        assert line["values"] == pytest.approx(wanted[line["label"]], abs=1e-6)


def test_scores_that_are_no_accuracies_are_measured_from_the_worst():
    run = made(30, objectives=("bytes", "error"))
    worst = [min(s[i] for s in map(scores, run.scored)) for i in (0, 1)]
    seen = Seen(page(run, "title"))
    wanted = run.progress(run.records, worst)
    assert seen.data["lines"][0]["values"] == pytest.approx(wanted, abs=1e-6)
    (caption,) = [t for t in seen.text_of("figcaption") if "hypervolume" in t]
    assert f"the worst that was seen (bytes {worst[0]:.4g}, error {worst[1]:.4g})" in caption


def test_the_funnels_add_up(run, text):
    counts = re.findall(r'<span class="count">([^<]*)</span>', text)
    numbers = [int(re.sub(r"\D", "", c)) for c in counts]
    screened, evaluated = numbers[: len(STAGES) + 1], numbers[len(STAGES) + 1 :]
    total = run.screened()
    assert screened == [*(total[stage] for stage in STAGES), total["passed"]]
    assert sum(screened) == total["screened"] and screened[-1] == 60
    statuses = run.statuses()
    assert evaluated == [*(statuses[s] for s in STATUSES if s != "ok"), len(run.scored)]
    assert sum(evaluated) == 60


def test_a_lineage_goes_from_the_random_graph_to_the_winner(run, text):
    blocks = text.split('<ol class="steps">')[1:]
    assert len(blocks) == len(run.best)
    for record, block in zip(run.best, blocks, strict=True):
        shown = re.findall(r'data-to="c(\d+)"', block.split("</ol>")[0])
        assert list(map(int, shown)) == run.lineage(record.candidate.number)[::-1]
    assert max(len(run.lineage(r.candidate.number)) for r in run.best) > 1


def test_what_a_mutation_changed_is_marked():
    assert marked("tanh(x)*gamma", "tanh(v0)*gamma") == "tanh(<mark>v0</mark>)*<wbr>gamma"
    assert marked("x", "<b>") == "<mark>&lt;b&gt;</mark>"


def test_the_table_compares_with_batch_norm_and_relu(run, text):
    body = text.split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    assert [r'class="known"' in row for row in rows[:3]] == [True, True, False]
    ranks = [int(n) for n in re.findall(r'<tr id="c(\d+)"', body)]
    assert ranks[: len(run.best)] == [r.candidate.number for r in run.best]
    assert sorted(ranks) == [r.candidate.number for r in run.scored]
    best = scores(run.best[0])[0]
    assert f"{100 * best:.1f}<small>{100 * (best - 0.7):+.1f}</small>" in rows[2]
    assert rows[2].count(">81.2<") == 3 and ">81.2<" not in rows[3]  # re-ranked


def test_numbers_are_written_to_be_read():
    accuracy, other = Score(0, "accuracy resnet", True), Score(1, "bytes", False)
    assert accuracy.text(0.98765) == "98.8" and other.text(-7.25) == "−7.25"
    assert accuracy.difference(0.9, 0.95) == "−5.0" and other.difference(-7, -9.5) == "+2.5"
    assert accuracy.difference(0.9, 0.9001) == "±0"


RUNS = {
    "empty": lambda: Archive(Setting(), ()),
    "bare": lambda: replace(made(8), references={}, reranked={}),
    "waiting": lambda: told(made(3), None),
    "no survivors": lambda: told(made(9), Outcome("time")),
    "known layers alone": lambda: replace(made(3), records=()),
    "one score": lambda: made(20, architectures=("resnet",)),
    "two": lambda: made(20, architectures=("resnet", "mobilenet")),
    "four": lambda: made(20, objectives=("accuracy", "bytes")),
    "five": lambda: made(20, objectives=("accuracy", "bytes", "error")),
    "all equal": lambda: told(made(9), Outcome("ok", scores=(0.5, 0.5, 0.5))),
}


def told(run, outcome):
    records = [replace(r, outcome=outcome) for r in run.records]
    return Archive(run.setting, tuple(records))


@pytest.mark.parametrize("name", RUNS)
def test_there_is_a_page_for_every_run(name):
    run = RUNS[name]()
    seen = Seen(page(run, "title"))
    panels = {1: 2, 2: 2, 3: 3, 4: 6, 5: 5}[len(run.names)]  # a single one in two sizes
    charts = [a for _, a in seen.tags if a.get("class") == "scatter"]
    known = any(o.told for o in run.references.values())
    assert len(charts) == (panels if run.scored or known else 0)
    assert len([a for _, a in seen.tags if a.get("class") == "curves"]) == 2 * bool(run.scored)


def test_scores_have_to_be_those_of_the_setting(run):
    with pytest.raises(NormcError, match="the baseline has other scores"):
        page(run, "title", made(3, objectives=("bytes",)))
    for wrong in ((0.5,), (0.5, 0.5, float("nan"))):
        known = {"bn": Outcome("ok", scores=wrong)}
        with pytest.raises(NormcError, match="bn has the scores"):
            page(replace(run, references=known), "title")


# --- its parts ------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_round_and_within(low, length, count):
    assume(length > 1e-6 * abs(low))
    found = ticks(low, low + length, count)
    slack = 1e-6 * max(abs(low), length)
    assert all(low - slack <= tick <= low + length + slack for tick in found)
    assert len(found) <= count + 1
    assert len(set(labels(found))) == len(found)


def test_an_axis_holds_what_it_is_made_for():
    axis = Axis.over([0.9, 1.0], (10, 110), factor=100, most=1.004)
    assert [text for _, text in axis.ticks()] == ["90", "95", "100"]
    assert 10 < axis(0.9) < axis(1.0) < 110
    assert Axis.over([2.0, 2.0], (0, 100))(2.0) == 50  # a single value is in the middle


def test_elements_escape_what_they_are_given():
    assert element("text", "a<b", x=1.0, data_key='"><') == (
        '<text x="1" data-key="&#34;&gt;&lt;">a&lt;b</text>'
    )


@pytest.mark.parametrize("name", ZOO)
def test_every_layer_of_the_zoo_is_set_as_math(name):
    pytest.importorskip("latex2mathml")
    seen = Seen(rendered(ZOO[name].text))
    assert seen.tags[0][0] == "math" and {"mi", "mrow"} <= {tag for tag, _ in seen.tags}


def test_math_is_escaped_and_not_made_of_what_is_no_formula():
    pytest.importorskip("latex2mathml")
    math = rendered("where(x < 0, signed_log(x), x)")
    assert "<mo>&lt;</mo>" in math and ">signed_log</mo>" in math
    assert rendered("x <") is None and rendered(HOSTILE) is None


def test_of_a_foreign_tree_only_what_is_math_is_written(monkeypatch):
    converter = pytest.importorskip("latex2mathml.converter")
    for tag, wanted in (("mi", "<mi>&lt;b&gt;</mi>"), ("script", None)):
        tree = Element(tag, {"onclick": "alert(1)", "href": "x"})
        tree.text = "&#x3C;b>"
        monkeypatch.setattr(converter, "convert_to_element", lambda _, tree=tree: tree)
        rendered.cache_clear()
        assert rendered("x") == wanted
    rendered.cache_clear()


def test_a_page_is_made_without_math(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    rendered.cache_clear()
    seen = Seen(page(run, "title"))
    rendered.cache_clear()
    assert "math" not in {tag for tag, _ in seen.tags}
    shown = [a["data-text"] for _, a in seen.tags if "data-text" in a]
    assert shown[0] == run.best[0].candidate.text


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def browse(tmp_path):
    """A page as it is after its script has run; nothing may be said on the console."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")

    def opened(text, quiet=True):
        place = tmp_path / "page.html"
        place.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900",
             "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom",
             place.as_uri()],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert not quiet or said == []
        return done.stdout, said

    return opened


def tried(text, script):
    """The page with a script of the test's, whose answer it writes down."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    script = f"(async () => {{ {script} }})().then(a => document.body.dataset.answer = "
    return text.replace("</body>", f"<script>{script} JSON.stringify(a))</script></body>")


def answer(dom):
    (found,) = [a["data-answer"] for tag, a in Seen(dom).tags if "data-answer" in a]
    return json.loads(found)


def test_the_script_runs_without_an_error(text, browse):
    dom, _ = browse(text)
    assert '<html lang="en" data-ready="yes">' in dom
    titles = [tag for tag, _ in Seen(dom).tags if tag == "title"]
    assert len(titles) == 1  # those of points are their labels now, the tooltip is in their place


@pytest.mark.parametrize("name", ["empty", "one score", "four"])
def test_the_script_runs_on_other_pages(name, browse):
    assert 'data-ready="yes"' in browse(page(RUNS[name](), "title"))[0]


def test_no_other_script_runs(text, browse):
    script = "<script>document.documentElement.dataset.bad = 1</script></body>"
    changed = text.replace("</body>", script).replace("<h1>", "<h1 onclick='1'><img src='x.png'>")
    dom, said = browse(changed, quiet=False)
    assert "data-bad" not in dom and 'data-ready="yes"' in dom
    assert sum("Content Security Policy" in line for line in said) >= 2


def test_a_click_on_a_head_sorts_the_table(run, text, browse):
    script = """
      const order = () => [...document.querySelectorAll("table.hall tbody tr[id]")].map(r => r.id);
      const click = i => {
        document.querySelectorAll("table.hall th[data-first] button")[i].click();
        return order();
      };
      const select = document.getElementById("order");
      const found = [click(1), click(1), click(3), click(3), click(0)];
      select.value = "3";
      select.dispatchEvent(new Event("change"));
      return [...found, order()];
    """
    up, down, best, worst, rank, selected = answer(browse(tried(text, script))[0])
    numbers = [f"c{r.candidate.number}" for r in run.scored]
    assert up == numbers and down == numbers[::-1]
    values = {f"c{r.candidate.number}": scores(r)[0] for r in run.scored}
    assert [values[i] for i in best] == sorted(values.values(), reverse=True)
    assert [values[i] for i in worst] == sorted(values.values())
    assert [values[i] for i in selected] == [values[i] for i in best]
    assert rank[0] == f"c{run.best[0].candidate.number}"


def test_a_tooltip_follows_the_pointer_and_the_keys(run, text, browse):
    number = run.best[0].candidate.number
    script = f"""
      const tip = document.getElementById("tip");
      const chart = document.querySelectorAll("svg.scatter")[1];
      const dot = chart.querySelector("[data-key='{number}']");
      const box = dot.getBoundingClientRect();
      const at = {{clientX: box.x + box.width / 2, clientY: box.y + box.height / 2}};
      const said = [tip.hidden];
      chart.dispatchEvent(new PointerEvent("pointermove", at));
      said.push(tip.textContent, document.querySelectorAll(".dot.on").length);
      chart.dispatchEvent(new PointerEvent("pointerleave", {{pointerType: "mouse"}}));
      said.push(tip.hidden);
      dot.focus();
      const key = name => document.activeElement.dispatchEvent(
        new KeyboardEvent("keydown", {{key: name, bubbles: true}}));
      key("ArrowLeft");
      said.push(tip.hidden, document.activeElement.dataset.key, tip.textContent);
      key("Escape");
      return [...said, tip.hidden];
    """
    first, shown, marked, gone, back, key, moved, last = answer(browse(tried(text, script))[0])
    assert (first, gone, back, last) == (True, True, False, True)
    best = [f"{100 * s:.1f}" for s in scores(run.best[0])]
    assert shown.startswith(f"No. {number}") and all(value in shown for value in best)
    assert marked == 3  # the same candidate in each panel
    assert key != str(number) and moved.startswith(f"No. {key}" if key.isdigit() else key[6:])


def test_progress_is_read_off_with_the_keys(run, text, browse):
    script = """
      const chart = document.querySelector("svg.curves");
      const key = name => chart.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
      key("Home"), key("PageUp"), key("ArrowRight");
      return document.getElementById("tip").textContent;
    """
    said = answer(browse(tried(text, script))[0])
    value = run.progress(run.records, (0, 0, 0))[21]
    assert said.startswith("after 22 evaluations") and f"this run{value:.4f}" in said


def test_a_button_copies_the_text(run, text, browse):
    script = """
      const copied = [];
      document.execCommand = name => copied.push(name, document.activeElement.value) > 0;
      const writeText = async text => { if (copied.length) throw 0; copied.push(text); };
      Object.defineProperty(navigator, "clipboard", {value: {writeText}});
      const [button] = document.querySelectorAll("table.hall button.copy");
      const wait = () => new Promise(done => setTimeout(done, 50));
      button.click();
      await wait();
      button.click();
      await wait();
      return [...copied, button.textContent];
    """
    text_of = run.best[0].candidate.text
    found = answer(browse(tried(text, script))[0])
    assert found == [text_of, "copy", text_of, "copied"]  # the second time by hand
