"""The page: it loads nothing from elsewhere, and in a browser a tree grows, can be walked, cancelled and read."""

from __future__ import annotations

import re
import time

import arithmetic_models
import pytest
from browser import Page, find_chromium
from tts_search import TextVerifier

PROBLEM = "Start with 20, add 5, multiply by 3, add 12. What is the result modulo 100?"
FILES = ("page/page.js", "page/style.css", "page/tree.js", "page/tree.css", "page/about.json")


def test_the_page_is_whole_and_lets_nothing_in(texts):
    page = texts.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert re.findall(r'(?:src|href)="([^"]+)"', page.text) == [
        "data:,", "page/style.css", "page/tree.css", "page/tree.js", "page/page.js",
    ]  # fmt: skip
    assert "<script>" not in page.text
    assert " style=" not in page.text
    for name in FILES:
        reply = texts.get(f"/{name}")
        assert reply.status_code == 200
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", reply.text)
    assert texts.get("/page/..%2fapp.py").status_code == 404
    assert texts.get("/page/app.py").status_code == 404


def test_every_input_has_a_label(texts):
    page = texts.get("/").text
    ids = re.findall(r'<(?:input|select|textarea) id="([^"]+)"', page)
    assert ids
    for one in ids:
        assert f'for="{one}"' in page or re.search(rf'<label[^>]*>[^<]*<[a-z]+ id="{one}"', page), one


@pytest.fixture
def chromium():
    return find_chromium() or pytest.skip("no Chromium to look at the page with: apt-get install chromium")


@pytest.mark.slow
def test_the_page_in_a_browser(chromium, live, tmp_path):
    with Page(chromium, f"{live}/", tmp_path / "profile") as page:
        page.wait("document.querySelectorAll('#method option').length > 3")
        page.type("#problem", PROBLEM)
        page.evaluate("document.getElementById('n').value = 8; document.getElementById('max_step_tokens').value = 64")
        page.evaluate("document.getElementById('seed').value = 4")
        page.click("#start")
        page.wait("document.getElementById('status').textContent.startsWith('Done')")
        nodes = page.evaluate("[...view.nodes.values()]")
        assert page.evaluate("document.querySelectorAll('.node').length") == len(nodes) > 8
        best = page.evaluate("document.querySelectorAll('.node.best').length")
        assert best == page.evaluate("view.pathTo(view.chosen).length") > 1
        lost = next(node for node in nodes if node["state"] == "pruned")
        page.evaluate(f"view.choose({lost['id']})")
        assert page.evaluate("document.querySelector('#detail pre').textContent") == lost["text"]
        page.click(".node.finished.best")
        assert page.evaluate("document.querySelectorAll('#detail dd').length") >= 4
        page.press("Home")
        assert page.evaluate("view.chosen") == 0
        page.press("ArrowRight")
        assert page.evaluate("document.activeElement.getAttribute('aria-level')") == "2"
        label = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert label.startswith("step of round 1")
        page.press("ArrowDown")
        page.press("ArrowLeft")
        assert page.evaluate("document.activeElement.getAttribute('role')") == "treeitem"
        assert int(page.evaluate("document.getElementById('tokens').textContent")) > 0
        page.screenshot(tmp_path / "page.png")
        page.call("Page.reload")
        page.wait("document.readyState === 'complete' && document.querySelectorAll('#method option').length > 3")
        assert page.complaints == []


@pytest.mark.slow
def test_cancelling_frees_the_search_and_what_a_model_writes_is_text(chromium, tmp_path, live_over):
    evil = "<img src=x onerror=alert(1)>\x1b[31m\u202e </script><script>document.title = 'owned'</script>"
    scores = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    url, engine = live_over(arithmetic_models.endless(evil, 0.05), scores)
    with Page(chromium, f"{url}/", tmp_path / "profile") as page:
        page.wait("document.querySelectorAll('#method option').length > 3")
        page.type("#problem", PROBLEM)
        page.evaluate("document.getElementById('max_steps').value = 200")
        page.click("#start")
        page.wait("view.nodes.size > 20")
        page.click("#cancel")
        page.wait("document.getElementById('status').textContent === 'Cancelled.'")
        page.evaluate("view.choose(view.order[1])")
        assert "<img" in page.evaluate("document.querySelector('#detail pre').textContent")
        assert page.evaluate("document.querySelectorAll('#detail img, main script').length") == 0
        assert page.evaluate("document.title") == "tts-search"
        deadline = time.monotonic() + 20
        while engine.num_in_flight:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert page.complaints == []
