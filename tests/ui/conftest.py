"A page of a real browser."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from lab import CHROMIUM, SWITCHES  # noqa: E402


def pytest_collection_modifyitems(items):
    "Each of two processes begins with two tests: the longest has a short one beside it, and who is free takes the last."
    order = ["test_notebook[start]", "test_pages", "test_notebook[gkd]", "test_search", "test_run_is_continued_and_stopped"]
    items.sort(key=lambda item: order.index(item.name) if item.name in order else len(order))


@pytest.fixture
def page():
    "A page that reaches loopback alone; at the end there must have been no error and no request elsewhere."
    from playwright.sync_api import sync_playwright
    problems = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport=dict(width=1400, height=1800))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url}"))
        page.on("response", lambda answer: problems.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
        page.on("request", lambda request: None if request.url.startswith(("http://127.0.0.1:", "data:", "blob:")) else problems.append(f"outside: {request.url}"))
        yield page
        browser.close()
    assert not problems, "\n".join(problems)
