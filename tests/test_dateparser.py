"""date("...") against dateparser, which Labtasker 1.0.1 uses: what both understand they understand alike, but for DEVIATIONS.

TEXTS are forms that people type, each tried at every one of TIMES in every one of ZONES; then as many are made at random
as LT_TEST_DATES says, and a disagreement is told with its seed."""
import datetime
import random
import time

import pytest

import faulty
import labtasker

dateparser = pytest.importorskip("dateparser", reason="dateparser is installed by tox's environment `full`")
import tzlocal  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Python, about days without a year
ZONES = ["UTC", "America/New_York", "Asia/Kolkata"]
TIMES = [datetime.datetime(2026, 11, 22, 14, 30, 15), datetime.datetime(2024, 2, 29, 6, 5),
         datetime.datetime(2026, 1, 30, 23, 59, 59), datetime.datetime(2025, 6, 2, 12, 0, 0, 250000)]

TEXTS = """
now; 3 hours ago; an hour ago; a hour ago; a minute ago; one day ago; 1.5 hours ago; two hours ago; three days ago
twelve days ago; 3 hours; 3 hrs ago; 3h ago; 3h; 30m ago; 5 min; 5 mins ago; 5min ago; 10 s ago; 2d; 2 days; 2 days ago
1 wk ago; 2 weeks ago; 2weeks ago; a week ago; 1 month ago; 1mo ago; 6 months ago; a month ago; a year ago; 1 yr ago; 1y
1 hour 30 minutes ago; 1 hour, 30 minutes ago; 1 hour and 30 minutes ago; 1h30m; 1h 30m ago; 2 days 3 hours ago
1 year 2 months ago; 1 week and 1 month ago; 20 minutes 5 seconds ago; 0 seconds ago; 24 hours ago; 90 minutes ago; -3h
-1d; in 2 days; in an hour; in 5 minutes; in 1 month; 2 days from now; ten minutes from now
last week; last month; last year; next week; next month; next year
monday; tue; Wednesday; thursday; fri; saturday; sunday; last monday; last tue; last Sunday; next monday; next friday
Monday 10:00; last friday at 5pm; next sunday 9:30; yesterday 10:00; yesterday at 10:00; yesterday at 10am; yesterday 10am
today 10:00; today at 3pm; tomorrow 9:30; tomorrow at noon; 10am; 10 am; 3pm; 3:30pm; 3:30 PM; 12am; 12:30 pm; 11:25
11:25:30; noon; midnight
Jul 28; July 28; 28 Jul; 28 July; 28th July; July 28th; Jul 1st; 2nd Jan; dec 31; Sept 3; sept. 3; Jan 1; 1 January 2026
Jul 28th 2025; July 28, 2025; Jul 28, 2025 11:25; 28 Jul 2025; 28-Jul-2025; 28 Jul 2025 11:25; Jul 28 11:25; Jul 28 3pm
Jul 28 at 11:25; Jul 28 11:25am; Jul 28 14:47 UTC; Jul 28 2025 11:25 +02:00; Mon Jul 28 2025; Sat Nov 21
Monday, July 28, 2025; Mon Jul 28 11:25:30 2025; Mon Jul 28 11:25:30 UTC 2025; Mon, 28 Jul 2025 11:25:30 +0200
2025-07-28; 2025-7-8; 2025/7/25; 2025.07.28; 2025-07-28 11:25; 2025/7/25 23:41; 2025-07-28 11:25:30; 2025-07-28 3pm
2025-07-28T11:25; 2025-07-28T11:25:30; 2025-07-28T11:25:30Z; 2025-07-28T11:25:30.5Z; 2025-07-28T11:25:30+02:00
2025-07-28T11:25:30.123456+00:00; 2025-07-28 11:25 UTC; 2025-07-28 11:25 GMT; 2025-07-28 11:25 +0200; 2025-07-28 11:25 -03
1753701930; FEB 28; Feb 29 2024
"""
TEXTS = [text.strip() for text in TEXTS.replace("\n", ";").split(";") if text.strip()]

MIDNIGHT, REFUSED, OURS = "midnight", "refused", "only ours"
DEVIATIONS = {  # text: what it is here, where dateparser has it otherwise or not at all
    "today": MIDNIGHT, "yesterday": MIDNIGHT, "tomorrow": MIDNIGHT,  # the contract; dateparser: this time of that day
    "1w": OURS,
    "28/07/2025": REFUSED, "07/28/2025": REFUSED, "7/28": REFUSED,  # day or month first? It depends on who reads it
    "28.07.2025": REFUSED, "25-07-28": REFUSED,  # dateparser: 2028
    "July 2025": REFUSED, "2025-07": REFUSED, "2025": REFUSED,  # dateparser: today's day of that month
    "this week": REFUSED, "this month": REFUSED,  # dateparser: now
    "last night": REFUSED, "this morning": REFUSED,  # dateparser: 20:00 and 9:00
    "11:25 PST": REFUSED, "2025-07-28 11:25 CET": REFUSED,  # names of zones are not unique
    "Feb 29 2025": REFUSED, "Feb 30": REFUSED, "25:00": REFUSED, "blah": REFUSED, "3 parsecs ago": REFUSED,
}


@pytest.fixture(params=ZONES)
def zone(request, monkeypatch):
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    tzlocal.reload_localzone()
    yield request.param
    monkeypatch.undo()
    time.tzset()
    tzlocal.reload_localzone()


def ours(text, wall):
    """Return what `text` means here when the clock shows `wall`, in seconds, or None where it is refused."""
    try:
        return float(labtasker.parse_date(text, labtasker.Instant(wall.timestamp())))
    except labtasker.LabtaskerValueError as error:
        assert "understood are" in str(error) or "does not exist" in str(error)
        return None


def theirs(text, wall):
    found = dateparser.parse(text, languages=["en"], settings={"RELATIVE_BASE": wall})
    return found and found.timestamp()


def test_there_are_texts():
    assert len(set(TEXTS)) == len(TEXTS) >= 120 and not set(TEXTS) & set(DEVIATIONS)


@pytest.mark.parametrize("wall", TIMES, ids=str)
def test_what_people_type_means_what_dateparser_makes_of_it(wall, zone):
    differ = {text: (ours(text, wall), theirs(text, wall)) for text in TEXTS if ours(text, wall) != theirs(text, wall)}
    assert not differ


@pytest.mark.parametrize("wall", TIMES, ids=str)
def test_where_dateparser_has_it_otherwise(wall, zone):
    for text, kind in DEVIATIONS.items():
        found, other = ours(text, wall), theirs(text, wall)
        assert (found is None) == (kind == REFUSED), text
        if kind == MIDNIGHT:
            day = datetime.datetime.fromtimestamp(other)
            assert day.time() == wall.time() and found == datetime.datetime.combine(day, datetime.time()).timestamp(), text
        elif kind == OURS:
            assert other is None, text


def a_text(dice):
    """Return a text of one of the forms that both know, and the amounts in it at random."""
    unit = dice.choice([word for unit in ("second", "minute", "hour", "day", "week", "month", "year") for word in (unit, unit + "s")])
    clock = dice.choice(["%d:%02d" % (dice.randrange(24), dice.randrange(60)), "%d%s" % (dice.randrange(1, 13), dice.choice(["am", "pm"])),
                         "%02d:%02d:%02d" % (dice.randrange(24), dice.randrange(60), dice.randrange(60))])
    year, month, day = dice.randrange(1990, 2040), dice.randrange(1, 13), dice.randrange(1, 29)
    name = labtasker.MONTH_NAMES[month - 1][:dice.choice([3, 20])].capitalize()
    weekday = dice.choice(["", "last ", "next "]) + dice.choice(labtasker.WEEKDAY_NAMES)[:dice.choice([3, 20])]
    date = dice.choice(["%s %d" % (name, day), "%d %s" % (day, name), "%s %d, %d" % (name, day, year), "%d %s %d" % (day, name, year),
                        "%d-%02d-%02d" % (year, month, day), "%d/%d/%d" % (year, month, day), weekday])
    return dice.choice(["%d %s ago" % (dice.randrange(100), unit), "in %d %s" % (dice.randrange(100), unit), date, date + " " + clock,
                        date + dice.choice([" at ", " "]) + clock, dice.choice(["today ", "yesterday at "]) + clock, clock])


def test_texts_made_at_random(zone):
    dice, understood = random.Random(faulty.setting("SEED")), 0
    for number in range(faulty.setting("DATES")):
        text, wall = a_text(dice), dice.choice(TIMES)
        found, other = ours(text, wall), theirs(text, wall)
        assert found == other or other is None, "seed %d, text %d: %r at %s: ours %s, dateparser's %s" % (
            faulty.setting("SEED"), number, text, wall, found, other)
        understood += other is not None
    assert understood > faulty.setting("DATES") * 0.8
