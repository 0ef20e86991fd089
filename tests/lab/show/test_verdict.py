"""The verdict in each form, the story and the timeline: true to the history, legible, small, and safe to show."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from distsys.lab.check.effects import exactly_once
from distsys.lab.check.limits import Allowance, at_most, no_needless_refusal
from distsys.lab.check.locks import mutual_exclusion, progress
from distsys.lab.check.tokens import no_stale_write
from distsys.lab.check.updates import no_lost_update
from distsys.lab.history.history import Check, Fault, Finding, History, Op
from distsys.lab.show import svg
from distsys.lab.show.story import story
from distsys.lab.show.timeline import LANES, LIMIT, timeline
from distsys.lab.show.verdict import Verdict, Verdicts
from tests.lab.histories import anything, history, killed, op, paused, queue, requests, section

TEXT = "{http://www.w3.org/2000/svg}text"
NASTY = "<script>alert('x')</script>\"&\x07\ud800 Замок 锁 " + "LockWithAVeryLongName" * 9


TEN_A_SECOND = Allowance(10, window_seconds=1.0)
BOUNDARY = requests(("w1", 0.9, 10, 0), ("w2", 1.05, 10, 0), ended=1.1)
STARVED = requests(("w1", 0.0, 10, 0), ("w1", 0.5, 0, 3), ("w1", 1.2, 0, 4), ("w2", 1.5, 1, 0), ended=4.0)


def verdict(past: History, check: Check, expected: Any = None, **more: Any) -> Verdict:
    found = check(past)
    more = {"title": "SET NX with a TTL", "claim": "One at a time.", "seed": 7, "runs": 20, **more}
    return Verdict(status=found.status, expected=expected, summary=found.summary, history=past, finding=found, **more)


def overlap(**more: Any) -> Verdict:
    return verdict(paused(), mutual_exclusion, **{"expected": "VIOLATED", **more})


def held(**more: Any) -> Verdict:
    return verdict(queue(), mutual_exclusion, **{"expected": "HELD", **more})


def timeline_svg(past: History, finding: Finding) -> str:
    return svg.document(*timeline(past, finding), finding.summary)


SCENES = {
    "overlap": overlap(),
    "unexpected": overlap(expected="HELD"),
    "held": held(),
    "eighty": verdict(queue(20), no_lost_update),
    "killed": verdict(killed(0.5), progress),
    "stuck": verdict(killed(None), progress),
    "refused": verdict(paused(last="fail"), no_stale_write),
    "nasty": overlap(title=NASTY, claim=NASTY, replay=NASTY, params={NASTY: NASTY}, servers={NASTY: NASTY}),
    "empty": verdict(History(), mutual_exclusion),
    "boundary": verdict(BOUNDARY, at_most(TEN_A_SECOND)),
    "starved": verdict(STARVED, no_needless_refusal(TEN_A_SECOND)),
    "limited": verdict(requests(("w1", 0.0, 10, 2), ("w2", 0.1, 0, 9)), at_most(TEN_A_SECOND)),
    "crowd": verdict(queue(2, workers=30), mutual_exclusion),
}
every_scene = pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())


class Page(HTMLParser):
    """What a browser makes of it: the tags, their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def images(self) -> list[dict[str, Any]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]


def picture(html: str) -> str:
    return base64.b64decode(Page(html).images[0]["src"].removeprefix("data:image/svg+xml;base64,")).decode()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# --- legible


def test_what_was_done_twice_is_written_twice() -> None:
    """The label of a request does not take the place of the label of its effect."""
    ops = [op("w1", name, t, t + 0.2, "order-1") for t in (1.0, 4.0) for name in ("request", "apply")]
    past = history(*ops, applied={"order-1": 2})
    assert timeline_svg(past, exactly_once(past)).count(">a order-1<") == 2


@pytest.mark.parametrize(("ink", "ground"), svg.TEXT_ON)
def test_text_stands_out_from_its_ground(ink: str, ground: str) -> None:
    """WCAG AA asks for 4.5 to 1."""
    assert contrast(ink, ground) >= 4.5


@every_scene
def test_every_text_is_in_a_measured_colour_and_at_least_11_px(scene: Verdict) -> None:
    """No text escapes the test above, and none is small print."""
    drawn = scene.svg()
    classes = dict(re.findall(r"\.(\w+)\{([^}]*)\}", svg.STYLE))
    for text in ElementTree.fromstring(drawn).iter(TEXT):
        style = ";".join(
            [
                f"fill:{svg.INK};font-size:13px",
                *(classes[c] for c in text.get("class", "").split()),
                text.get("style", ""),
            ]
        )
        assert re.findall(r"(?<!-)fill:(#\w+)", style)[-1] in {ink for ink, _ in svg.TEXT_ON}
        assert float(re.findall(r"font-size:(\d+)px", style)[-1]) >= 11


@every_scene
def test_no_text_leaves_the_card(scene: Verdict) -> None:
    """Long names are cut and long sentences wrapped; measured as a wide sans-serif sets them."""
    for text in ElementTree.fromstring(scene.svg()).iter(TEXT):
        css = text.get("class", "").split()
        wide = svg.width_of(text.text or "", 11 if {"caption", "small"} & set(css) else 13)
        start = float(text.get("x", "0")) - (wide if "end" in css else wide / 2 if "middle" in css else 0)
        if float(text.get("x", "0")) > 0:  # the legend's letters stand at their own origin
            assert start >= -1
            assert start + wide <= svg.WIDTH + 1, text.text


def test_a_violation_is_never_told_by_colour_alone() -> None:
    """Hatch, cross and words stand beside the red."""
    drawn = overlap().svg()
    assert "url(#red)" in drawn
    assert 'class="violation"' in drawn
    assert 'class="alarm"' in drawn
    assert {"VIOLATED", "2 holders", "two hold at once"} <= set(ElementTree.fromstring(drawn).itertext())


def test_the_card_brings_its_own_opaque_light_ground() -> None:
    """A dark page must not shine through; the HTML around the card leaves colours to the page."""
    html = overlap()._repr_html_()
    assert f'height="{picture(html).split("height=")[1].split(chr(34))[1]}" fill="{svg.PAPER}"/>' in picture(html)
    assert luminance(svg.PAPER) == 1
    assert not any(
        "color" in (attrs.get("style") or "") or "background" in (attrs.get("style") or "")
        for _, attrs in Page(html).tags
    )


# --- safe and small


@every_scene
def test_the_card_is_one_picture_and_plain_html(scene: Verdict) -> None:
    """Nothing in it that GitHub or an untrusted notebook would take out."""
    html = scene._repr_html_()
    page = Page(html)
    allowed = {"div", "img", "table", "thead", "tbody", "tr", "th", "td", "p", "pre", "details", "summary"}
    assert {tag for tag, _ in page.tags} <= allowed
    assert len(page.images) == 1
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(picture(html)).iter()}
    assert tags <= {"svg", "title", "style", "defs", "pattern", "path", "rect", "g", "text", "circle"}
    assert "http" not in picture(html).replace("http://www.w3.org/2000/svg", "")
    assert len(html) < 60_000


def test_whatever_a_user_names_things_it_stays_text() -> None:
    """Class names, parameters and process names come from notebooks, and end up on other people's screens."""
    odd = overlap(title=NASTY, claim=NASTY, replay=NASTY, params={NASTY: NASTY}, servers={NASTY: NASTY})
    html = odd._repr_html_()
    assert "<script" not in html
    assert "<script" not in picture(html)
    assert "<script>alert('x')" in Page(html).text
    assert NASTY[:27] in Page(html).images[0]["alt"]
    html.encode()
    renamed = replace(paused(), ops=tuple(replace(o, process=NASTY) if o.process == "w1" else o for o in paused()))
    ElementTree.fromstring(picture(verdict(renamed, mutual_exclusion)._repr_html_()))


@settings(max_examples=80)
@given(anything())
def test_any_history_makes_a_card_that_parses(past: History) -> None:
    """However strange the history, there is a well-formed picture, a story, and a dict that comes back."""
    limits = (at_most(Allowance(1, refill_rate=0.5)), no_needless_refusal(TEN_A_SECOND))
    for check in (mutual_exclusion, no_lost_update, progress, *limits):
        one = verdict(past, check)
        ElementTree.fromstring(one.svg())
        told = story(past, one.finding)
        assert 1 <= len(told) <= 5
        assert all(sentence.endswith(".") and "\n" not in sentence for sentence in told)
        assert json.loads(json.dumps(kept := one.to_dict(), allow_nan=False)) == kept


# --- the timeline


@pytest.mark.parametrize(("rounds", "more"), [(15, ""), (20, "+20 more acquisitions")])
def test_at_most_sixty_bars_are_drawn_and_the_rest_is_counted(rounds: int, more: str) -> None:
    """A long run makes a small picture that says what it leaves out."""
    drawn = timeline_svg(queue(rounds), mutual_exclusion(queue(rounds)))
    assert drawn.count('class="hold"') == LIMIT + 1  # one is the legend's
    assert [text for text in ElementTree.fromstring(drawn).itertext() if text.startswith("+")] == (
        [more] if more else []
    )


def test_a_crowd_of_processes_is_cut_to_twelve_lanes() -> None:
    """The picture says how many more there were."""
    texts = list(ElementTree.fromstring(SCENES["crowd"].svg()).itertext())
    assert sum(re.fullmatch(r"w\d+", text) is not None for text in texts) == LANES
    assert "+18 more processes" in texts


def test_the_picture_zooms_on_the_first_violation() -> None:
    """The picture shows the tenth of a second that matters in a minute, and says so."""
    calm = [o for n in range(30) for o in section("w3", 2.0 * n, 2.0 * n + 0.1, 2.0 * n + 0.2)]
    clash = [*section("w1", 30.4, 30.5, 30.9), *section("w2", 30.6, 30.7, 31.0)]
    past = history(*calm, *clash, ended=60)
    texts = list(ElementTree.fromstring(timeline_svg(past, mutual_exclusion(past))).itertext())
    assert "2 holders" in texts
    assert any(text.startswith("zoomed on 30.3 to 3") for text in texts)
    assert "10 s" not in texts


def test_faults_tokens_values_and_leases_are_on_the_picture() -> None:
    """What the story says can be seen."""
    drawn = timeline_svg(paused(), mutual_exclusion(paused()))
    texts = list(ElementTree.fromstring(drawn).itertext())
    for expected in ("w1 paused (before-write)", "#1", "#2", "w 101", "lease ends", "paused", "waiting", "2 holders"):
        assert expected in texts
    refused = timeline_svg(paused("fail"), no_stale_write(paused("fail")))
    assert "refused" in list(ElementTree.fromstring(refused).itertext())
    assert "url(#both)" in refused
    assert 'class="violation"' not in refused, "two holders are no violation of this check"


# --- the story


def test_the_story_tells_the_lost_update_from_the_history() -> None:
    """When who entered, why it could, and what it cost, each with its time."""
    assert story(paused(), mutual_exclusion(paused())) == [
        "t=0.06 s: w1 acquired (token #1).",
        "w1's lease ended at 0.26 s while it was paused.",
        "t=0.30 s: w2 acquired (#2) while w1 still held the lock.",
        "w2 wrote 101 at 0.33 s.",
        "w1 still wrote 101 at 0.42 s, over w2's 101 and its newer token: one update is lost.",
    ]


def test_the_story_tells_what_was_survived() -> None:
    """A verdict of HELD says under which load and faults."""
    assert story(killed(0.5), progress(killed(0.5)))[:2] == [
        "2 processes acquired 2 times, never two at once; 1 of 2 requests came while another held.",
        "t=0.25 s: w1 killed (before-release), its lease ran until 0.56 s; w2 acquired 320 ms later.",
    ]
    assert "w1's write of 101 under #1 was refused at 0.42 s." in story(paused("fail"), no_stale_write(paused("fail")))


def test_the_story_of_a_limit_tells_who_was_admitted_and_refused() -> None:
    """How often and when, in the counterexample and over all."""
    assert story(BOUNDARY, SCENES["boundary"].finding) == [
        "w1 was admitted 10 times at 0.90 s.",
        "w2 was admitted 10 times at 1.05 s.",
        "20 requests by 2 processes: 20 admitted, 0 refused.",
    ]
    assert story(STARVED, SCENES["starved"].finding) == [
        "w1 was admitted 10 times at 0.00 s.",
        "w1 was refused with 10 of 10 left at 1.20 s.",
        "18 requests by 2 processes: 11 admitted, 7 refused.",
        "w1 was admitted 10 of 17 times, last at 0.00 s; w2 1 of 1 time, last at 1.50 s.",
    ]
    assert story(SCENES["limited"].history, SCENES["limited"].finding) == [
        "21 requests by 2 processes: 10 admitted, 11 refused.",
        "w1 was admitted 10 of 12 times, last at 0.00 s; w2 0 of 9 times.",
    ]


def test_the_picture_counts_requests_and_brackets_those_that_are_too_many() -> None:
    """Ten ticks on one spot would be no picture."""
    for scene, expected in (
        ("boundary", ["10", "20 admitted, 10 too many", "admitted, how many"]),
        ("starved", ["10", "3", "4", "refused with 10 of 10 left", "refused"]),
        ("limited", ["10", "2", "9"]),
    ):
        texts = list(ElementTree.fromstring(SCENES[scene].svg()).itertext())
        assert all(text in texts for text in expected), texts


def test_the_story_of_a_lock_that_nobody_gets_again() -> None:
    """The holder died, and the one who asked still waits."""
    assert story(killed(None), progress(killed(None))) == [
        "t=0.06 s: w1 acquired.",
        "t=0.25 s: w1 killed (before-release).",
        "w2 asked at 0.10 s and still had no answer at 2.00 s.",
    ]


def test_the_story_calls_an_update_lost_if_its_overwriter_had_read_before_it() -> None:
    """The values do not matter: a process that read after the other's write keeps it."""
    both = [*section("w1", 0, 1, 9), *section("w2", 0.5, 2, 8), op("w2", "write", 3, 3.1, 10)]
    blind = history(*both, op("w1", "read", 2, 2.5, 0), op("w1", "write", 4, 4.1, 1))
    assert "w1 wrote 1 at 4.10 s, over w2's 10: one update is lost." in story(blind, mutual_exclusion(blind))
    aware = history(*both, op("w1", "read", 3.5, 3.6, 10), op("w1", "write", 4, 4.1, 11))
    assert "w1 wrote 11 at 4.10 s, over w2's 10." in story(aware, mutual_exclusion(aware))


def test_the_story_tells_the_last_two_of_many_writes() -> None:
    """The last one is what the others are lost under."""
    ops = [op("w2", "write", t, t + 0.1, value) for t, value in ((2.1, 1), (2.3, 2), (2.5, 3))]
    crowd = history(*section("w1", 0, 1, 9), *section("w2", 0.5, 2, 8), *ops, op("w1", "write", 3, 3.1, 1))
    told = story(crowd, mutual_exclusion(crowd))
    assert told[2:4] == ["w2 wrote 3 at 2.60 s.", "w1 wrote 1 at 3.10 s, over w2's 3."]


def test_the_story_blames_a_lease_only_on_evidence() -> None:
    """It may have been renewed: only a later grant shows that the server let it end."""
    early = history(*section("w1", 0, 1, 9, value={"ttl": 5.0}), *section("w2", 0.5, 2, 8))
    assert not any("lease" in text for text in story(early, mutual_exclusion(early)))
    alone = history(op("w1", "acquire", 0, 1, {"ttl": 5.0}), op("w2", "acquire", 2, None), faults=[(3, "killed", "w1")])
    assert not any("lease" in text for text in story(alone, progress(alone)))


# --- the verdict


def test_the_badge_counts_the_runs() -> None:
    """HELD promises no more than was seen; VIOLATED says in how many runs it was."""
    assert held().badge == "✓ HELD - no violation found in 20 runs"
    assert overlap(stats={"violated_runs": 20}).badge == (
        "✗ VIOLATED - 2 holders at once, 1 of 4 acquisitions, in 20 of 20 runs"
    )
    assert str(overlap(runs=1)).endswith("2 holders at once, 1 of 4 acquisitions (expected: violated)")
    assert SCENES["empty"].badge.startswith("? INCONCLUSIVE - nobody acquired")


def test_an_unexpected_verdict_is_hard_to_miss() -> None:
    """In the line, in the card, in its alternative text, and in the comparison."""
    wrong = overlap(expected="HELD")
    assert str(wrong).endswith("(EXPECTED: HELD)")
    assert "NOT AS EXPECTED" in wrong._repr_html_()
    assert svg.ALARM in wrong.svg()
    assert svg.ALARM not in overlap().svg()
    assert "NOT AS EXPECTED" in Page(Verdicts([overlap(), wrong])._repr_html_()).text
    assert overlap(expected=None).as_expected, "of a reader's own candidate nothing is expected"


def test_assert_expected_fails_with_the_story_and_the_line_that_replays_it() -> None:
    """What CI prints is enough to see what happened."""
    assert overlap().assert_expected()
    with pytest.raises(AssertionError, match=r"(?s)EXPECTED: HELD.*w1's lease ended.*distsys run x"):
        overlap(expected="HELD", replay="distsys run x").assert_expected()
    with pytest.raises(AssertionError, match="INCONCLUSIVE"):
        verdict(History(), mutual_exclusion, "HELD").assert_expected()


def test_the_dict_is_json_and_has_all_of_the_verdict() -> None:
    """A verdict can be kept and compared elsewhere."""
    one = overlap(params={"ttl": 0.2}, servers={"redis": "Valkey 9.1.2, embedded"}, stats={"p50": 0.0021})
    told = one.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told.keys() == {f.name for f in fields(Verdict)}
    assert [Op(**o) for o in told["history"]["ops"]] == list(one.history)
    assert [Fault(**f) for f in told["history"]["faults"]] == list(one.history.faults)
    assert [Op(**o) for o in told["finding"]["witness"]] == list(one.finding.witness)
    odd = overlap(params={"lock": object, 1: float("nan"), "set": {1}, "bytes": b"x"})
    json.dumps(odd.to_dict(), allow_nan=False)


def test_the_alternative_text_is_badge_and_story() -> None:
    """A reader who cannot see the picture gets the whole argument."""
    alt = Page(overlap()._repr_html_()).images[0]["alt"]
    assert "✗ VIOLATED - 2 holders at once" in alt
    assert all(sentence in alt for sentence in story(paused(), overlap().finding))


def test_the_fold_holds_what_it_takes_to_run_it_again() -> None:
    """Seed, versions, parameters, and the line."""
    text = Page(
        overlap(servers={"redis": "Valkey 9.1.2"}, params={"ttl": 0.2}, replay="distsys run x --seed 7")._repr_html_()
    ).text
    for expected in ("seed", "7", "Valkey 9.1.2", "ttl", "0.2", "distsys run x --seed 7"):
        assert expected in text


def test_long_tables_are_cut_and_counted() -> None:
    """Twelve rows show the pattern."""
    rows = tuple((f"{n} s", "w1", "lost") for n in range(30))
    text = Page(replace(overlap(), finding=replace(overlap().finding, violations=rows))._repr_html_()).text
    assert "11 s" in text
    assert "12 s" not in text
    assert "+18 more" in text


def test_the_summary_of_several_arms_is_words_only() -> None:
    """Every run gives the same text, so that the output of a notebook can be compared."""
    arms = Verdicts([overlap(title="Textbook"), held(title="RedisLock"), held(title="Mine", expected=None)])
    assert arms.summary() == "Textbook: VIOLATED (as expected)\nRedisLock: HELD (as expected)\nMine: HELD"
    assert "NOT as expected: HELD" in Verdicts([overlap(expected="HELD")]).summary()
    assert arms.assert_expected() is arms
    with pytest.raises(AssertionError, match="Textbook"):
        Verdicts([held(), overlap(title="Textbook", expected="HELD")]).assert_expected()


def test_several_arms_are_compared_in_one_table() -> None:
    """Arm, verdict, what was expected, runs, p50 and p99 where measured, violations; a card for each below."""
    page = Page(Verdicts([overlap(stats={"p50": 0.0021, "p99": 0.0874}), held()])._repr_html_())
    for expected in ("arm", "p50", "2.1 ms", "87 ms", "✗ VIOLATED", "✓ HELD", "violations"):
        assert expected in page.text
    assert len(page.images) == 2
    assert Page(Verdicts()._repr_html_()).images == []


def test_a_finding_without_witness_or_rows_still_makes_a_card() -> None:
    """The lab itself reports INCONCLUSIVE when a server is missing, with nothing recorded."""
    missing = Finding("INCONCLUSIVE", "not run: pgbouncer is not installed")
    one = replace(SCENES["empty"], finding=missing, summary=missing.summary)
    assert "Nothing was recorded." in one.svg()
    assert "not run: pgbouncer" in str(one)
    assert op("w1", "x", 0, None).end == 0
