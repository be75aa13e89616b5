"""The site of documentation in a real browser, as `make docs` left it in _docs: nothing is fetched from elsewhere, search finds names.
Screenshots go to out/ui."""
import functools
import http.server
import threading
from pathlib import Path

import pytest
from lab import CHROMIUM

ROOT = Path(__file__).parent.parent.parent
SITE, SHOTS = ROOT/"_docs", ROOT/"out"/"ui"
PAGES = ("index.html", "nbs/losses/02_logits.html", "nbs/06_plots.html", "papers/gkd.html", "api/losses/logits.html", "results/index.html")
pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="!!! NO BROWSER TESTS: chromium is not here and could not be installed"),
              pytest.mark.skipif(not SITE.exists(), reason="no site in _docs: run make docs")]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.timeout(600)
def test_pages(address, page):
    SHOTS.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{address}/index.html")
        page.wait_for_load_state("networkidle") # what the next page cuts off would be a failed request
        page.evaluate("localStorage.clear()") # the last choice of a scheme
        for place in PAGES:
            page.goto(f"{address}/{place}")
            page.wait_for_load_state("networkidle")
            assert page.locator("body").get_attribute("data-md-color-scheme") == dict(light="default", dark="slate")[scheme]
            assert page.locator("h1").count() == 1
            assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{place} is wider than the window"
            page.screenshot(path=SHOTS/f"site_{place.replace('/', '_')}_{scheme}.png")


@pytest.mark.timeout(600)
def test_search(address, page):
    page.goto(f"{address}/index.html")
    page.locator(".md-search__input").fill("kd_kl")
    page.locator(".md-search-result__item a").first.wait_for(timeout=60_000)
    assert any("logits" in link.get_attribute("href") for link in page.locator(".md-search-result__item a").all())
