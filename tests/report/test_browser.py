"""The page in a real browser: it draws, fits, covers, uncovers, filters; nothing else runs or loads."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import made_up_report as made_up
from safeglasses.report.html import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--force-prefers-reduced-motion",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
FLAGS += ["--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
LEAK = (
    "<script>document.documentElement.dataset.owned='1'</script><img src='/pixel.png'>"
    "<img src=x onerror=\"document.documentElement.dataset.owned='2'\">"
)


class Site(ThreadingHTTPServer):
    """Serves the pages, remembers who asked for what, and takes the harness's answer."""

    def __init__(self, pages: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.asked = pages, list[str]()
        self.answer, self.answered = {}, threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        found = self.server.pages.get(self.path)
        self.send_response(200 if found is not None else 404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write((found or "").encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.answer = json.loads(body)
        self.server.answered.set()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A site that shows the report, and the report as it would be had escaping failed."""
    page = render(made_up.make_report())
    harness = Path(__file__).with_name("harness.html").read_text(encoding="utf-8")
    leaky = page.replace("</body>", LEAK + "</body>")
    with Site({"/harness.html": harness, "/page.html": page, "/leaky.html": leaky}) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def seen(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Open the pages in one browser and return what the harness saw."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    profile = tmp_path_factory.mktemp("profile")
    address = f"http://127.0.0.1:{site.server_port}/harness.html"
    browser = subprocess.Popen(
        [CHROMIUM, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert site.answered.wait(timeout=240), "the browser did not answer"
    finally:
        browser.terminate()
        browser.wait(timeout=60)
    assert "error" not in site.answer, site.answer["error"]
    return site.answer


def test_all_figures_are_drawn_without_breaking_the_policy(seen: dict) -> None:
    assert seen["drawn"] is True
    for page in ("wide", "phone"):
        assert seen[page]["figures"] == "7"
        assert seen[page]["violations"] == "0"
        assert "owned" not in seen[page]


def test_nothing_is_cut_off_or_scrolls_sideways(seen: dict) -> None:
    for page in ("wide", "phone"):
        assert seen[page]["overflow"] <= 0
        assert seen[page]["tooWide"] == []
        assert seen[page]["cutOff"] == []


def test_offensive_content_is_covered_until_asked_for(seen: dict) -> None:
    covering = seen["covering"]
    veils, one_card = covering["veils"], covering["ofCard"]
    assert veils > 20
    assert covering["atFirst"] == veils
    assert covering["afterButton"] == veils - one_card
    assert (covering["pressed"], covering["label"]) == ("true", "Hide")
    assert covering["afterSecond"] == veils
    assert covering["afterCard"] == veils - one_card
    assert (covering["afterAll"], covering["allChecked"]) == (0, "true")


def test_answers_can_be_filtered(seen: dict) -> None:
    assert len(seen["filtering"][""]) == 6
    for status in ("fixed", "broken", "unchanged", "unscored"):
        assert set(seen["filtering"][status]) == {status}


def test_light_and_dark_change_page_and_figures(seen: dict) -> None:
    before, after = seen["theming"]
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_even_unescaped_output_can_neither_run_nor_load(seen: dict, site: Site) -> None:
    assert seen["leaky"]["planted"] == 2
    assert "owned" not in seen["leaky"]
    assert int(seen["leaky"]["violations"]) >= 2
    assert {p for p in site.asked if p != "/favicon.ico"} == {"/harness.html", "/page.html", "/leaky.html"}
