"""date("...") by the cases in cases/dates.txt, and durations."""
import pathlib
import re
import time

import pytest

import labtasker

CASES = pathlib.Path(__file__).with_name("cases") / "dates.txt"


def dates():
    """Return [(now, TZ, text, what it means)]."""
    found, now, zone = [], None, None
    for line in CASES.read_text(encoding="utf-8").splitlines():
        if line.startswith("now "):
            _, now, zone = line.split() if "=>" not in line else (None, now, zone)
        if "=>" in line and not line.startswith("#"):
            text, meaning = line.split("=>")
            found.append((now, zone, text.rstrip(), meaning.strip()))
    return found


def test_there_are_cases():
    assert len([meaning for *_, meaning in dates() if meaning[0] != "!"]) > 60
    assert len([meaning for *_, meaning in dates() if meaning[0] == "!"]) > 20


@pytest.fixture
def in_zone(monkeypatch):
    """A function that sets this process's zone until the test ends."""
    def use(zone):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
    yield use
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("now, zone, text, meaning", dates())
def test_date(now, zone, text, meaning, in_zone):
    in_zone(zone)
    if meaning.startswith("!"):
        with pytest.raises(labtasker.LabtaskerValueError, match=re.escape(meaning[2:])) as caught:
            labtasker.parse_date(text, labtasker.parse_time(now))
        assert repr(text) in str(caught.value)
    else:
        found = labtasker.parse_date(text, labtasker.parse_time(now))
        assert labtasker.format_time(found) == labtasker.format_time(labtasker.parse_time(meaning))
        assert type(found) is labtasker.Instant


@pytest.mark.parametrize("unit", labtasker.UNITS)
def test_every_spelling_of_every_unit_is_understood(unit):
    now = labtasker.parse_time("2026-11-22T14:30:15Z")
    assert labtasker.UNITS[unit][0]
    for word in labtasker.UNITS[unit][0].split():
        assert labtasker.parse_date("2 %s ago" % word, now) == labtasker.parse_date("2 %s ago" % unit, now) < now
        assert labtasker.parse_date("in 2 %s" % word, now) > now


def test_the_message_shows_only_what_is_understood():
    now = labtasker.parse_time("2026-11-22T14:30:15Z")
    assert len(labtasker.DATE_FORMS) > 5
    for shown in labtasker.DATE_FORMS:
        for text in shown.split(", "):
            assert labtasker.parse_date(text, now)


@pytest.mark.parametrize("text, seconds", [
    ("90", 90), (90, 90), (1.5, 1.5), ("1.5", 1.5), (".5", 0.5), ("50s", 50), ("50 s", 50), ("10 min", 600),
    ("10m", 600), ("1.5h", 5400), ("1h30m", 5400), ("1 hour, 30 minutes", 5400), ("1 hour and 30 min", 5400),
    ("an hour", 3600), ("2d", 172800), ("1 week", 604800), ("  1H  30M ", 5400), (0, 0),
])
def test_duration(text, seconds):
    found = labtasker.parse_duration(text)
    assert found == seconds and type(found) is float


@pytest.mark.parametrize("value", ["", "abc", "1x", "-5", "1h-", "1 month", "h", "5 5", -1, True, None, [], {}, "nan",
                                   float("nan"), float("inf"), "9" * 400, "1h,", "1e3", "1:30"])
def test_what_is_no_duration_is_refused_and_the_forms_are_shown(value):
    with pytest.raises(labtasker.LabtaskerValueError, match="understood are seconds or text such as") as caught:
        labtasker.parse_duration(value)
    assert repr(value) in str(caught.value)


def test_the_message_shows_only_durations_that_are_understood():
    assert len(labtasker.DURATIONS) > 3
    assert all(labtasker.parse_duration(shown) > 0 for shown in labtasker.DURATIONS)
