"""A browser for the tests: Debian's headless Chromium, driven by Playwright, with all that a page may not do recorded.

`tox -e page` installs both. Run as a script it installs Debian's `chromium` where that is missing and this user may,
else it says why not; then the tests skip with that reason. `Tab` is one tab with its records: what went to the console,
where its requests went, dialogs, broken security policy, shifts of the layout, long tasks. `Mouse` and `Keys` are the
two hands that use a page."""
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
SIZES = {"narrow": (360, 740), "desk": (1280, 800), "wide": (3840, 2160)}
SHOTS = os.environ.get("LT_TEST_SHOTS", "")  # a folder that screenshots are left in
WAIT_MS = 30000
RECORDER = """
window.seen = {shift: 0, shifts: [], longest: 0, broken: []};
addEventListener("securitypolicyviolation", e => seen.broken.push(e.violatedDirective + " " + e.blockedURI));
const elementOf = ({node}) => node && (node.closest ? node : node.parentElement);
const isRow = (source) => elementOf(source) && elementOf(source).closest("#table tbody");  // others may come above it
new PerformanceObserver(list => { for (const one of list.getEntries()) {
    if (one.hadRecentInput || one.sources.length && one.sources.every(isRow)) continue;
    seen.shift += one.value;
    seen.shifts.push([one.value, ...one.sources.map(elementOf).map(node => node && node.outerHTML.slice(0, 100))]);
} }).observe({type: "layout-shift", buffered: true});
new PerformanceObserver(list => { for (const one of list.getEntries())
    seen.longest = Math.max(seen.longest, one.duration); }).observe({type: "longtask", buffered: true});
"""
SIDEWAYS = """() => {
    const root = document.scrollingElement, width = root.clientWidth;
    if (root.scrollWidth <= width) return [];
    return [[root.scrollWidth, "the page"], ...[...document.body.querySelectorAll("*")]
        .map(node => [node.getBoundingClientRect().right, node.outerHTML.slice(0, 80)])
        .filter(([right]) => right > width + 1).slice(0, 12)];
}"""
CROOKED = """() => [...document.querySelectorAll("table")].filter(one => one.checkVisibility()).flatMap(table => {
    const rows = [...table.tBodies[0].rows], way = cell => getComputedStyle(cell).textAlign.replace("start", "left");
    return [...table.tHead.rows[0].cells].map((head, at) => {
        const cells = rows.map(row => row.cells[at]).filter(cell => cell && cell.textContent);
        const areNumbers = cells.length && cells.every(cell => /^-?[\\d.]+(e-?\\d+)?$/.test(cell.textContent));
        const wanted = areNumbers ? "right" : way(head);
        return [head.textContent, way(head), ...new Set(cells.map(way))].concat(
            [way(head), ...cells.map(way)].some(one => one !== wanted) ? ["crooked"] : []);
    }).filter(found => found.includes("crooked"));
})"""
WHERE = """one => {
    const here = document.activeElement, name = here.outerHTML.slice(0, 80);
    if (one === here) return ["here", name];
    const isBefore = here !== document.body && here.compareDocumentPosition(one) & Node.DOCUMENT_POSITION_PRECEDING;
    return [isBefore ? "before" : "after", name];
}"""
CHOICE = """(select, label) => {
    const names = [...select.options].map(one => one.label), here = select.selectedIndex;
    return [names[here], names.indexOf(label) > here ? "ArrowDown" : "ArrowUp"];
}"""
AXE = """axe.run(document, {resultTypes: ["violations"],
    rules: {"label-content-name-mismatch": {enabled: true}}})"""  # newer versions have it on


def missing():
    """Return why there is no browser to test with, or None."""
    if not shutil.which("chromium"):
        return "no `chromium` on the PATH (Debian's package): tox -e page"
    try:
        import axe_playwright_python  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as error:
        return "%s: tox -e page" % error
    return None


class Chromium:
    """A running browser; `tab` opens a tab. One a test run; each test's tabs share nothing with another's."""

    def __init__(self):
        from playwright.sync_api import sync_playwright
        self.playwright = sync_playwright().start()  # launch() makes a new, empty folder for the user's data
        self.app = self.playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        self.axe = (pathlib.Path(__import__("axe_playwright_python").__file__).parent / "axe.min.js").read_text("utf-8")

    @contextlib.contextmanager
    def session(self, size="desk", scheme="light"):
        """Give a Session of a person with that screen."""
        width, height = SIZES[size]
        context = self.app.new_context(viewport={"width": width, "height": height}, color_scheme=scheme,
                                       has_touch=size == "narrow", accept_downloads=True)
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(RECORDER)
        try:
            yield Session(self, context)
        finally:
            context.close()

    def close(self):
        self.app.close()
        self.playwright.stop()


class Session:
    """One person's browser: its tabs share storage."""

    def __init__(self, chromium, context):
        self.chromium, self.context, self.tabs = chromium, context, []

    def tab(self):
        self.tabs.append(Tab(self))
        return self.tabs[-1]


class Tab:
    """A tab: `page` is Playwright's; the lists are what it did."""

    def __init__(self, session):
        self.session, self.page = session, session.context.new_page()
        self.console, self.errors, self.dialogs, self.urls, self.asked_password = [], [], [], [], []
        self.page.on("console", lambda one: self.console.append((one.type, one.text)))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", self.dialog)
        self.page.on("request", lambda request: self.urls.append(request.url))

    def dialog(self, dialog):
        self.dialogs.append((dialog.type, dialog.message))
        dialog.dismiss()

    def seen(self, name):
        return self.page.evaluate("seen." + name)

    def is_blameless(self, *known):
        """Assert that the page broke no rule. `known` are texts of console messages that the test brought about."""
        origin = "/".join(self.page.url.split("/", 3)[:3])
        foreign = [url for url in self.urls if not url.startswith((origin + "/", "blob:" + origin, "data:"))]
        assert not foreign, foreign
        assert not self.errors and not self.dialogs, (self.errors, self.dialogs)
        odd = [text for kind, text in self.console if not any(one in text for one in known)]
        assert not odd, odd
        assert not self.seen("broken"), self.seen("broken")

    def axe(self):
        """Return what axe-core finds as lines: rule, how bad, where."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(self.session.chromium.axe)
        found = self.page.evaluate(AXE)
        assert found["passes"], "axe tried nothing"
        return ["%s (%s): %s: %s" % (one["id"], one["impact"], one["help"], node["html"][:200])
                for one in found["violations"] for node in one["nodes"]]

    def sideways(self):
        """Return what makes the page wider than the screen: (right edge in pixels, HTML); nothing where it fits."""
        return self.page.evaluate(SIDEWAYS)

    def crooked(self):
        """Return the columns whose head is not aligned as their cells are, or whose numbers are not at the right."""
        return self.page.evaluate(CROOKED)

    def shoot(self, name, whole=False):
        """Leave a screenshot where LT_TEST_SHOTS says."""
        if SHOTS:
            self.page.screenshot(path=os.path.join(SHOTS, name + ".png"), full_page=whole, animations="disabled")


class Mouse:
    """Uses controls by clicks."""

    def __init__(self, page):
        self.page = page

    def press(self, control):
        control.click()

    def fill(self, control, text):
        control.click()
        control.fill(text)

    def choose(self, control, label):
        control.select_option(label=label)


class Keys:
    """Uses controls by the keyboard alone: Tab, or Shift+Tab, until the control has the focus, then keys."""

    MOST = 400  # presses of Tab: more is no way to get anywhere

    def __init__(self, page):
        self.page = page

    def reach(self, control):
        """Tab to a control; AssertionError with what was met on the way where it can't be reached."""
        control.wait_for()
        met = []
        for _ in range(self.MOST):
            where, name = control.evaluate(WHERE)
            if where == "here":
                return
            met.append(name)
            self.page.keyboard.press("Tab" if where == "after" else "Shift+Tab")
        raise AssertionError("no Tab leads to %s; met: %s" % (control, "\n".join(dict.fromkeys(met))))

    def press(self, control):
        self.reach(control)
        self.page.keyboard.press("Space" if control.evaluate("one => one.type === 'checkbox'") else "Enter")

    def fill(self, control, text):
        self.reach(control)
        self.page.keyboard.press("Control+A")
        self.page.keyboard.press("Delete")
        self.page.keyboard.insert_text(text)

    def choose(self, control, label):
        """Go through a select's options by the arrows: letters would have to come fast."""
        control.get_by_role("option", name=label, exact=True).wait_for(state="attached")
        self.reach(control)
        for _ in range(self.MOST):
            shown, way = control.evaluate(CHOICE, label)
            if shown == label:
                return
            self.page.keyboard.press(way)
        raise AssertionError("arrows do not lead to %r in %s, which shows %r" % (label, control, shown))


def install():
    """Install Debian's chromium where it is missing; say what is in the way where it can't be."""
    if shutil.which("chromium"):
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        print("no chromium, and only root can install Debian's: apt-get install chromium", file=sys.stderr)
        return
    for words in (["update"], ["install", "--yes", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
        if subprocess.call(["apt-get", "-qq"] + words, env=dict(os.environ, DEBIAN_FRONTEND="noninteractive")):
            print("apt-get %s failed" % words[0], file=sys.stderr)


if __name__ == "__main__":
    install()
