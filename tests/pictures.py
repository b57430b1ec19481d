"""Makes the README's pictures: docs/page.png, the page in headless Chromium, and docs/watch.png, what `watch` shows.

`python3 tests/pictures.py` makes both anew; `python3 tests/pictures.py FOLDER` leaves the page's views there instead, in
widths from a phone's to a desk's and in both colour schemes, to be looked at. It needs what the page's tests need
(`tox -e page`). The sweep is made up, under a clock that is three hours back when it begins; its server is a real one."""
import contextlib
import html
import math
import os
import pathlib
import random
import re
import sys
import tempfile

import browser
import labtasker
import labtasker_cli
from harness import PASSWORD, ROOT, Server, wait_until

QUEUE = "vision"
SWEEP = {"lr": [0.03, 0.01, 0.003, 0.001], "model": ["resnet50", "vit_b16", "convnext"], "wd": [0, 0.0001], "seed": [0, 1, 2]}
FIXED = {"dataset": "cifar100", "epochs": 90}
DONE = 59  # tasks that have ended; the next four run
LOST = {0: "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.25 GiB", 2: "ValueError: loss is nan"}
HOSTS = ("gpu-01", "gpu-01", "gpu-02", "gpu-02")
WIDTHS = ((390, 844), (1280, 800), (1600, 1000))
TERMINAL = """<style>body { margin: 0; background: #101216; } pre { margin: 0; padding: 14px 18px; color: #e2e6eb; width: max-content;
    font: 14px/1.35 "DejaVu Sans Mono", monospace; } .c1 { font-weight: 700; } .c2 { color: #9aa4af; } .c7 { background: #2a2f38; }
    .c36 { color: #4cc3d4; } .c34 { color: #84a9ff; } .c32 { color: #4fbf7d; } .c31 { color: #f07171; } .c33 { color: #d9a441; }
    </style><pre>%s</pre>"""


class Past:
    """A clock that goes by itself, from three hours ago to now; a context in which the module has it."""

    def __init__(self):
        self.real, self.at = labtasker.now, labtasker.now() - 3 * 3600

    def __enter__(self):
        labtasker.now = lambda: labtasker.Instant(int(self.at * 1e6) / 1e6)

    def __exit__(self, *_):
        labtasker.now = self.real


def accuracy(args):
    """Return what such a run would reach."""
    best = {"resnet50": 0.01, "vit_b16": 0.001, "convnext": 0.003}[args["model"]]
    return 0.81 - 0.06 * abs(math.log10(args["lr"] / best)) + (0.004 if args["wd"] else 0) + random.uniform(-0.006, 0.006)


def run_sweep(folder):
    """Submit the sweep, and run most of it: on four GPUs, with a model now and then too large for its memory."""
    clock = Past()
    with clock:
        labtasker.submit_grid(SWEEP, task_name="cifar", args=FIXED, max_retries=1)
        workers = [labtasker.create_worker("%s-%d" % (host, at % 2)) for at, host in enumerate(HOSTS)]
        step_s = (clock.real() - clock.at - 400) / DONE
        under_way = []
        for at in range(DONE + 4):
            clock.at += step_s * random.uniform(0.4, 1.6) if at < DONE else 60
            if len(under_way) == 4:
                end_run(folder, *under_way.pop(0))
            worker = workers[at % 4]
            task = labtasker.fetch_task(worker_id=worker, eta_max="9h", start_heartbeat=False).task
            under_way.append((task, worker))
        for task, _ in under_way:
            labtasker.report_task_status(task.task_id, "running", {"acc": round(accuracy(task.args) * 0.8, 4)})


def end_run(folder, task, worker):
    """Report how a run ended."""
    lost = LOST.get(task.args["seed"]) if task.args["model"] == "convnext" and task.args["lr"] > 0.005 else None
    if lost and task.args["wd"]:
        log = folder / "logs" / task.task_id / task.run_id
        log.mkdir(parents=True)
        (log / "run.log").write_text("epoch 1\nTraceback (most recent call last):\n%s\n" % lost)
        return labtasker.report_task_status(task.task_id, "failed", {"labtasker_error": "exit code 1"})
    acc = accuracy(task.args)
    return labtasker.report_task_status(task.task_id, "success", {
        "acc": round(acc, 4), "loss": round(2.3 * (1 - acc) + random.uniform(0, 0.02), 4)})


@contextlib.contextmanager
def sweep_served(folder):
    """Give a Server whose queue has the sweep; this process is its client."""
    random.seed(7)
    store = folder / ".labtasker"
    with Server(store, QUEUE) as server:
        server.stop()
        os.chdir(str(folder))
        (store / "config.toml").write_text('[queue]\nqueue_name = "%s"\npassword = "%s"\n' % (QUEUE, PASSWORD))
        labtasker.use_client(None)
        run_sweep(store)
        labtasker.use_client(None)
        server.start()
        yield server


def logged_in(session, server, address):
    """Return a Tab that shows an address of the page."""
    tab = session.tab()
    tab.page.goto(server.url + "/" + address)
    tab.page.get_by_label("Queue").fill(QUEUE)
    tab.page.get_by_label("Password").fill(PASSWORD)
    tab.page.get_by_role("button", name="Log in").click()
    tab.page.locator("#connection.live").wait_for()
    tab.page.wait_for_load_state("networkidle") if not address else tab.page.locator("#table tbody tr").first.wait_for()
    return tab


BEST = "#status=success&sort=summary.acc"
VIEWS = {"tasks": "#view=tasks", "best": BEST, "failed": "#status=failed", "lr": "#filter=args.lr+==+0.01&sort=summary.acc"}


def shoot_views(chromium, server, folder):
    """Leave pictures of the Tasks view in all sizes and schemes; say what is wider than its screen."""
    for scheme in ("light", "dark"):
        with chromium.session("desk", scheme) as session:
            tab = logged_in(session, server, BEST)
            for width, height in WIDTHS:
                tab.page.set_viewport_size({"width": width, "height": height})
                for name, address in VIEWS.items():
                    tab.page.goto(server.url + "/" + address)
                    tab.page.mouse.move(0, 0)
                    tab.page.wait_for_timeout(700)
                    tab.page.screenshot(path=str(folder / ("%s-%d-%s.png" % (name, width, scheme))), animations="disabled")
                    print(name, width, scheme, tab.sideways() or "fits")


def shoot_page(chromium, server, path):
    """Leave the README's picture of the page."""
    with chromium.session() as session:
        tab = logged_in(session, server, BEST)
        tab.page.set_viewport_size({"width": 1100, "height": 620})
        tab.page.mouse.move(0, 0)
        tab.page.wait_for_timeout(700)
        tab.page.screenshot(path=str(path), animations="disabled")


def coloured(line):
    """Return a line with a terminal's colours as HTML."""
    pieces = re.split("\x1b\\[([0-9;]*)m", line)
    shown, styles = [html.escape(pieces[0])], ""
    for code, text in zip(pieces[1::2], pieces[2::2]):
        styles = "" if code == "0" else " ".join("c" + one for one in code.split(";"))
        shown.append('<span class="%s">%s</span>' % (styles, html.escape(text)))
    return "".join(shown)


def shoot_watch(chromium, path):
    """Leave the README's picture of `watch`, 90 columns wide."""
    feed = labtasker_cli.Feed({}, 60)
    wait_until(lambda: feed.seen()[3], "watch has looked")
    lines = labtasker_cli.Watch(feed, {}, "%s at %s" % (QUEUE, "http://head:9321")).lines(90, 28)
    with chromium.session() as session:
        tab = session.tab()
        tab.page.set_content(TERMINAL % "\n".join(map(coloured, lines)))
        tab.page.locator("pre").screenshot(path=str(path))


def main(folder=None):
    chromium = browser.Chromium()
    try:
        with tempfile.TemporaryDirectory() as place, sweep_served(pathlib.Path(place)) as server:
            if folder:
                return shoot_views(chromium, server, pathlib.Path(folder))
            shoot_page(chromium, server, ROOT / "docs" / "page.png")
            shoot_watch(chromium, ROOT / "docs" / "watch.png")
    finally:
        os.chdir(str(ROOT))
        chromium.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
