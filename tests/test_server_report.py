"""The report: one safe, complete page for every record that a run may leave."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import example_results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server import facts
from server.report import render, write_report
from shared import page_style as report_style
from shared.markup import element

VARIANTS: dict[str, dict[str, Any]] = {
    "private": example_results(),
    "no privacy": example_results(1, private=False),
    "dropouts": example_results(2, sites=8, rounds=30, dropouts=True),
    "hundred sites": example_results(3, sites=100, rounds=12, dropouts=True),
    "one round": example_results(4, rounds=1),
    "untested": example_results(5, tested=False, baselines=False),
    "many rounds": example_results(6, rounds=1300),
    "empty": {},
}


class Page(HTMLParser):
    """A page's elements; fails on a tag that is not closed, or closed twice."""

    VOID = frozenset({"meta", "br", "hr", "col", "link", "img", "input"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} was never opened"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check_page(source: str) -> Page:
    """Balanced, and nothing in it can run or load anything."""
    page = Page(source)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has the handler {name}"
            assert name not in ("src", "srcset", "action", "xlink:href", "style")
            assert name != "href" or (value or "").startswith("#")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in source[: source.index("<style>")].replace("&#x27;", "'")
    return page


def all_texts(table: Any) -> Any:
    """Every place in a record that holds a text, as (container, key)."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in list(items):
        if isinstance(value, str):
            yield table, key
        elif isinstance(value, dict | list):
            yield from all_texts(value)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_record_gives_a_sound_page(name: str) -> None:
    source = render(VARIANTS[name])
    page = check_page(source)
    assert source == render(copy.deepcopy(VARIANTS[name]))
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    if name != "empty":
        links = {(a["href"] or "")[1:] for tag, a in page.elements if tag == "a"}
        assert links <= set(ids)


def test_the_checker_sees_what_it_should() -> None:
    for bad in ("<p>a</b></p>", "<p>", "</p>"):
        with pytest.raises(AssertionError):
            Page(bad)
    good = render(VARIANTS["one round"])
    for bad in ("<script></script>", "<p onclick='x'></p>", "<a href='https://x.test'>x</a>"):
        with pytest.raises(AssertionError):
            check_page(good.replace("</main>", bad + "</main>"))


HOSTILE = (
    "<script>alert(1)</script>",
    '" onload="alert(1)',
    "' onclick='alert(1)",
    "</style><script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "<!--",
    "]]>",
    "&lt;b&gt;",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_and_never_run(text: str) -> None:
    """The same text in every place of the record, keys included."""
    record = example_results(rounds=6, dropouts=True)
    for container, key in list(all_texts(record)):
        if key not in ("mode",):
            container[key] = text
    for table in (record["privacy"]["sites"], record["final"]["per_site"]):
        table[text] = table.pop("north")
    record["wire"]["by_phase"][text] = record["wire"]["by_phase"].pop("agree")
    record["baselines"]["local"]["per_site"][text] = {"auroc": 1.0}
    page = check_page(render(record))
    assert page.text.count(text) > 20


def test_a_name_cannot_reorder_or_break_the_page() -> None:
    record = example_results(rounds=2)
    record["title"] = "a\u202eb\x00c\x1b[31md\ud800e\u2066f"
    source = render(record)
    source.encode("utf-8")
    check_page(source)
    assert not set(source) & set("\u202e\x00\x1b\u2066")


@given(st.text(max_size=40))
def test_escaping_gives_back_the_text(text: str) -> None:
    page = Page(element("p", text, title=text))
    shown = element("p", text)
    assert "".join(page.texts).replace("\r", "\n") == "".join(Page(shown).texts)
    if all(c.isprintable() for c in text):
        assert "".join(page.texts) == text
        assert page.elements[0][1]["title"] == text


JUNK = st.sampled_from(
    [None, "x", "", [], {}, True, -1, 0, 1e300, 10**400, math.nan, math.inf, [None], {"a": None}]
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_record_still_gives_a_page(data: st.DataObject) -> None:
    """Keys missing, null or of any type: the page is drawn from what is left."""
    record = example_results(7, rounds=5, sites=4, dropouts=True)
    for _ in range(data.draw(st.integers(1, 4))):
        table: Any = record
        while True:
            keys = list(table) if isinstance(table, dict) else list(range(len(table)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(table[key], dict | list) and data.draw(st.booleans()):
                table = table[key]
                continue
            if isinstance(table, dict) and data.draw(st.booleans()):
                del table[key]
            else:
                # A copy: a later turn may change it, and the next example draws it again.
                table[key] = copy.deepcopy(data.draw(JUNK))
            break
    check_page(render(record))


def test_charts_can_be_read_without_seeing_them() -> None:
    page = check_page(render(VARIANTS["dropouts"]))
    charts = [a for tag, a in page.elements if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(charts) > 10
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 10 for a in charts)
    headings = [a for tag, a in page.elements if tag == "th"]
    assert all(a.get("scope") in ("row", "col") for a in headings)
    regions = [a for tag, a in page.elements if a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [report_style._LIGHT, report_style._DARK])
def test_letters_stand_out_from_their_ground(palette: str) -> None:
    """At least 4.5 to 1, WCAG 2.2, criterion 1.4.3."""
    colours = dict(re.findall(r"--([a-z-]+):(#[0-9a-f]{6})", palette))
    on_sheet = ("ink", "soft", "accent", "study", "pooled", "local", "promise")
    pairs = [(name, "sheet") for name in on_sheet] + [("warn", "warn-wash"), ("stop", "stop-wash")]
    for letters, ground in pairs:
        dark, light = sorted((luminance(colours[letters]), luminance(colours[ground])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (letters, ground)


def test_every_round_is_in_the_table_of_numbers() -> None:
    record = VARIANTS["dropouts"]
    page = check_page(render(record))
    numbers = page.text[page.text.index("Every round in numbers", 2000) :]
    for entry in record["rounds"]:
        if entry["metrics"]:
            assert f"{entry['metrics']['auroc']:.3f}" in numbers


def test_promise_and_spending_are_in_plain_words() -> None:
    text = check_page(render(VARIANTS["private"])).text
    assert "charged at most ε = 3.98 of the 4.00 promised at δ = 1e-5" in text
    for words in ("the patient of one hospital", "add or remove one patient", "Poisson", "PLD"):
        assert words in text
    assert "NO PRIVACY" not in text
    assert "PROMISE BROKEN" not in text
    assert "A patient of k hospitals has k times the sensitivity" in text
    assert "to ε = 7.96" in text  # two hospitals, 3.98 each
    assert f"{math.exp(3.98):.3g} times as likely" in text
    assert "98.2 % of the time" in text


def test_spent_epsilon_is_never_rounded_down() -> None:
    record = example_results(rounds=2)
    for site in record["privacy"]["sites"].values():
        site["epsilon"] = 3.9813
    assert "ε = 3.99 of the 4.00 promised" in check_page(render(record)).text


def test_a_broken_promise_is_said_first() -> None:
    record = example_results(rounds=3)
    record["privacy"]["sites"]["east"]["epsilon"] = 4.0004
    text = check_page(render(record)).text
    assert "PROMISE BROKEN: epsilon 4.001 was spent, 4.000 was promised." in text
    assert text.index("PROMISE BROKEN") < text.index("4 hospitals trained")


@pytest.mark.parametrize("where", ["mode", "privacy"])
def test_no_privacy_is_branded_wherever_the_record_says_so(where: str) -> None:
    record = example_results(rounds=3)
    target = record if where == "mode" else record["privacy"]
    target["mode"] = "none"
    text = check_page(render(record)).text
    assert "NO PRIVACY: simulation only" in text
    assert text.index("NO PRIVACY") < text.index("hospitals trained one model")
    assert "promised" not in text.replace("no epsilon is promised", "")


def test_an_unknown_mode_claims_nothing() -> None:
    record = example_results(rounds=3)
    del record["mode"]
    text = check_page(render(record)).text
    assert "take it that there was NO PRIVACY" in text
    assert "charged at most" not in text


def test_hospitals_that_do_better_alone_are_named() -> None:
    record = example_results(rounds=3)
    alone = {"north": 0.97, "south": 0.94, "east": 0.90, "west": 0.9504}
    for name, value in alone.items():
        record["baselines"]["local"]["per_site"][name]["auroc"] = value
        record["final"]["per_site"][name]["auroc"] = 0.95
    text = check_page(render(record)).text
    assert "Yes: for 1 hospital (north)" in text
    assert "0.970 0.950 +0.020" in text
    assert "1 hospital had a better AUROC alone" in text
    record["baselines"]["local"]["per_site"]["north"]["auroc"] = 0.949
    assert "Would a hospital do better alone? No:" in check_page(render(record)).text


def test_alone_and_together_are_compared_on_the_same_patients() -> None:
    record = example_results(rounds=3)
    record["baselines"]["local"]["per_site"] = {"north": {"auroc": 0.93, "brier": 0.2}}
    record["final"]["metrics"] = {"auroc": 0.5, "brier": 0.9}  # of other patients, too
    record["final"]["per_site"]["north"] = {"auroc": 0.95, "brier": 0.1}
    assert facts.better_alone(record, "auroc") == []
    assert facts.better_alone(record, "brier") == []  # less is better
    record["final"]["per_site"]["north"] = {"auroc": 0.91, "test_patients": 30}
    found = facts.better_alone(record, "auroc")
    assert found == [facts.BetterAlone("north", 0.93, 0.91, 30.0)]
    assert facts.better_alone(record, "brier") is None


def test_aborted_rounds_and_dropouts_are_told() -> None:
    record = VARIANTS["dropouts"]
    aborted = [r["round"] for r in record["rounds"] if r["aborted"]]
    lost = sum(len(r["dropped"]) for r in record["rounds"])
    assert aborted
    page = check_page(render(record))
    assert f"{lost} dropouts in" in page.text
    assert f"{30 - len(aborted)} of 30" in page.text
    assert "What was spent on it stays spent" in page.text
    drawn = [a for _, a in page.elements if a.get("class") == "cell-dropped"]
    assert len(drawn) == lost + 1  # and the legend's sample


def test_every_distinct_set_of_contributors_is_listed_with_its_sums() -> None:
    record = VARIANTS["dropouts"]
    page = check_page(render(record))
    sums = [frozenset(r["contributors"]) for r in record["rounds"] if not r["aborted"]]
    assert len(set(sums)) > 3
    assert f"{len(sums)} sums were opened, over {len(set(sums))} different sets" in page.text
    for inside in set(sums):
        without = [s for s in facts.site_names(record) if s not in inside] or ["nobody"]
        row = f"{len(inside)} {facts.listing(without, 12)} {sums.count(inside)}"
        assert row in " ".join(page.text.split())
    alike = check_page(render(example_results(1, rounds=5)))
    assert "different sets" not in alike.text


def test_a_hospital_that_came_late_is_not_said_to_have_been_in_every_round() -> None:
    record = example_results(1, sites=4, rounds=5)
    late = record["cohort"]["sites"][-1]
    for entry in record["rounds"][:2]:
        entry["cohort"].remove(late)
        entry["contributors"].remove(late)
    text = check_page(render(record)).text
    assert "contributed to all" not in text
    assert "some came later" in text


def test_the_server_saw_sums_over_no_fewer_than_the_least_round() -> None:
    record = VARIANTS["dropouts"]
    least = min(len(r["contributors"]) for r in record["rounds"] if not r["aborted"])
    text = check_page(render(record)).text
    assert f"No sum here was over fewer than {least} hospitals; at least 5 are required" in text


def test_bytes_per_parameter_are_those_of_the_record() -> None:
    record = example_results(rounds=4, sites=4)
    for entry in record["rounds"]:
        entry["bytes_up"], entry["bytes_down"] = 4 * 1234 * 3, 4 * 1234 * 5
    assert "3.00 bytes up, 5.00 bytes down" in check_page(render(record)).text


def test_auditors_find_the_hashes() -> None:
    record = VARIANTS["private"]
    page = check_page(render(record))
    for value in (record["plan_sha256"], record["model"]["sha256"], "fedward-secagg/1"):
        assert value in page.text


def test_a_long_study_stays_a_readable_page() -> None:
    source = render(VARIANTS["many rounds"])
    assert len(source) < 1_000_000
    assert "One round in 3, every aborted one and the last" in source
    rows = re.findall(r"<tr", source)
    assert len(rows) < 600


def test_own_warnings_are_shown_once() -> None:
    record = example_results(rounds=2)
    record["synthetic"] = True
    record["warnings"] += ["The clock was set back.", "The clock was set back.", "Synthetic data"]
    text = check_page(render(record)).text
    assert text.count("The clock was set back.") == 1
    assert text.count("Synthetic data") == 1
    assert text.casefold().count("metrics are exact") == 1


def test_guess_bound_at_known_points() -> None:
    assert facts.guess_bound(0.0, 0.0) == 0.5
    assert facts.guess_bound(0.0, 1.0) == 1.0
    assert facts.guess_bound(math.log(3), 0.0) == pytest.approx(0.75)


def test_accuracy_interval_at_a_published_value() -> None:
    """Wilson's interval for 81 of 263: Newcombe, Statistics in Medicine 1998, table I."""
    record = {"final": {"metrics": {"accuracy": 81 / 263, "patients": 263}}}
    interval = facts.accuracy_interval(record)
    assert interval is not None
    assert interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert facts.auroc_interval(record) is None


def test_auroc_interval_covers_what_repeated_studies_give() -> None:
    """The formula is exact for exponential scores: draw many studies and compare the spread."""
    positives, negatives, ratio = 20, 30, 9.0
    rng = np.random.default_rng(0)
    higher = rng.exponential(ratio, (4000, positives, 1))
    lower = rng.exponential(1.0, (4000, 1, negatives))
    measured = float((higher > lower).mean(axis=(1, 2)).std())
    record = {
        "final": {
            "metrics": {"auroc": ratio / (1 + ratio)},
            "per_site": {
                "a": {"test_patients": 30, "positives": 5},
                "b": {"test_patients": 20, "positives": 15},
            },
        }
    }
    interval = facts.auroc_interval(record)
    assert interval is not None
    assert (0.9 - interval[0]) / 1.959964 == pytest.approx(measured, rel=0.04)


def test_importances_and_groups_are_shown_where_the_plan_released_them() -> None:
    record = example_results(3)
    page = "".join(Page(render(record)).texts)
    first, second = (page.index(name) for name in ("worst area (0.183 to 0.225)", "mean texture ("))
    assert first < second  # the largest first
    assert "0.204" in page[first:second]
    assert "0.931 (0.861 to 1.000)" in page
    assert "Groups of few patients are mostly noise" in page
    for name, shown in (("importances", "What moves the answer"), ("groups", "By group")):
        assert shown in page
        del record["final"][name]
        assert shown not in "".join(Page(render(record)).texts)


def test_write_report_leaves_one_file(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_report(VARIANTS["private"], target)
    write_report(VARIANTS["no privacy"], target)
    assert target.read_text(encoding="utf-8") == render(VARIANTS["no privacy"])
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
