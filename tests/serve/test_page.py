"""The page: it loads nothing from elsewhere, and in a browser a tree grows, can be walked, cancelled and read."""

from __future__ import annotations

import re
import time

import arithmetic_models
import pytest
from browser import Page, find_chromium, pictures_in
from tts_search import SearchConfig, TextVerifier
from tts_search.lab.checkpoints import load_models

OPTIONS = "document.querySelectorAll('#method option').length > 3"
PROBLEM = (
    "Start with 66, add 6, subtract 3, add 12, multiply by 6, subtract 1, multiply by 6. What is the result modulo 100?"
)
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


def fill(page: Page, **fields: object) -> None:
    """Type a problem and what is to be done with it."""
    page.wait(OPTIONS)
    page.type("#problem", PROBLEM)
    for name, value in fields.items():
        page.evaluate(f"(one => {{ one.value = {value}; one.dispatchEvent(new Event('input')) }})(at('{name}'))")


def search(page: Page, **fields: object) -> None:
    """Search, and wait for the answer."""
    fill(page, **fields)
    page.click("#start")
    page.wait("at('status').textContent.startsWith('Done')")


@pytest.fixture
def demo(live_over):
    """The address of a server over the smallest demo models, which have read nothing before, and its engine."""
    loaded = load_models()
    models = loaded.policies["policy-0.1m"], loaded.verifiers["prm-weak"]
    return live_over(*models, names=("policy-0.1m",), verifier_names=("prm-weak",))


@pytest.mark.slow
def test_the_page_in_a_browser(chromium, live, tmp_path):
    with Page(chromium, f"{live}/", tmp_path / "profile") as page:
        search(page, n=8, max_step_tokens=64, seed=4)
        nodes = page.evaluate("[...view.nodes.values()]")
        assert page.evaluate("document.querySelectorAll('.node').length") == len(nodes) > 8
        best = page.evaluate("document.querySelectorAll('.node.best').length")
        assert best == page.evaluate("view.pathTo(view.chosen).length") > 1
        lost = next(node for node in nodes if node["state"] == "pruned")
        page.evaluate(f"view.choose({lost['id']})")
        assert page.evaluate("document.querySelector('#detail pre').textContent") == lost["text"]
        page.click(".node.finished.best")
        assert page.evaluate("document.querySelectorAll('#detail dd').length") >= 4
        page.call("Page.reload")
        page.wait(f"document.readyState === 'complete' && {OPTIONS}")
        assert page.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "picture"), [("light", "serve.png"), ("dark", "serve-dark.png")])
def test_the_page_can_be_read_in_both_schemes(chromium, demo, tmp_path, scheme, picture):
    with Page(chromium, f"{demo[0]}/", tmp_path / "profile") as page:
        page.emulate(scheme, height=860)
        page.wait(OPTIONS)
        page.assert_readable(scheme)
        search(page, n=8, max_step_tokens=64, seed=2)
        page.assert_readable(scheme)
        page.evaluate("at('seconds').parentElement.hidden = true")  # the one thing that a search does not repeat
        page.evaluate("document.activeElement.blur()")
        page.screenshot(pictures_in(tmp_path) / picture)
        page.evaluate("say('Error: something', true)")
        page.assert_readable(scheme)
        other = "dark" if scheme == "light" else "light"
        page.emulate(other)  # while it is open
        page.assert_readable(other)


@pytest.mark.slow
def test_the_counters_are_what_the_server_counts(chromium, demo, tmp_path):
    with Page(chromium, f"{demo[0]}/", tmp_path / "profile") as page:
        page.wait(OPTIONS)
        page.evaluate(
            "var seen = []; new MutationObserver(() => seen.push(['unique', 'logical'].map(one => at(one).textContent)"
            ".concat(view.nodes.size))).observe(at('logical'), {childList: true})"
        )
        search(page, n=8, max_step_tokens=64, seed=2)
        seen = [
            [int(number) for number in re.findall(r"\d+", " ".join(map(str, row)))] for row in page.evaluate("seen")
        ]
        shown = {one: page.evaluate(f"at('{one}').textContent") for one in ("tokens", "read", "unique", "logical")}
        sent = page.evaluate("request()")
    config = SearchConfig(**{name: value for name, value in sent.items() if name not in ("problem", "stream")})
    stats = demo[1].submit(PROBLEM, config).result().stats
    assert any(0 < unique < logical for unique, _, logical, _, _ in seen)
    assert all(unique <= most and logical <= more for unique, most, logical, more, _ in seen)
    assert shown["tokens"] == str(stats.policy_tokens)
    assert int(shown["read"]) > 0
    assert shown["unique"] == f"0, at most {stats.peak_unique_kv_tokens}"
    assert shown["logical"] == f"0, at most {stats.peak_logical_kv_tokens}"


@pytest.mark.slow
def test_the_page_by_keyboard_and_to_a_screen_reader(chromium, demo, tmp_path):
    focused = "document.activeElement"
    stops = "document.querySelectorAll('.node[tabindex=\"0\"]').length"
    with Page(chromium, f"{demo[0]}/", tmp_path / "profile") as page:
        fill(page, n=8, max_step_tokens=64, seed=2)
        page.evaluate("at('start').focus()")
        page.press("Enter")
        page.wait("at('status').textContent.startsWith('Done')")
        assert page.evaluate(f"{focused}.id") == "start"
        assert page.evaluate(stops) == 1
        page.press("Tab")  # Cancel cannot be used now
        assert page.evaluate(f"{focused}.getAttribute('role')") == "treeitem"
        assert float(page.evaluate(f"parseFloat(getComputedStyle({focused}).outlineWidth)")) >= 2
        page.press("Home")
        walked = []
        for _ in page.evaluate("view.order"):
            walked.append(page.evaluate(f"Number({focused}.dataset.id)"))
            assert page.evaluate("view.chosen") == walked[-1]
            assert page.evaluate(stops) == 1
            page.press("ArrowDown")
        assert walked == page.evaluate("view.order")
        assert sorted(walked) == sorted(page.evaluate("[...view.nodes.keys()]"))
        page.press("Home")
        page.press("ArrowRight")
        assert page.evaluate(f"{focused}.getAttribute('aria-level')") == "2"
        assert page.evaluate(f"{focused}.getAttribute('aria-label')").startswith("step of round 1")
        page.press("ArrowLeft")
        assert page.evaluate("view.chosen") == 0
        names = page.named()
        assert len(names["treeitem"]) == len(walked)
        for role in ("treeitem", "tree", "textbox", "combobox", "spinbutton", "button", "status", "complementary"):
            assert names.get(role), role
            assert role == "status" or all(names[role]), role


def freed(engine) -> None:
    """Wait until nothing is in flight."""
    deadline = time.monotonic() + 20
    while engine.num_in_flight:
        assert time.monotonic() < deadline
        time.sleep(0.01)


EVIL = "<img src=x onerror=alert(1)>\x1b[31m\u202e </script><script>document.title = 'owned'</script>"


@pytest.fixture
def endless(live_over):
    """The address of a server whose policy comes to no end, and its engine."""
    scores = TextVerifier(lambda branches: [[0.5] * len(steps) for _, steps in branches])
    return live_over(arithmetic_models.endless(EVIL, 0.05), scores)


@pytest.mark.slow
def test_cancelling_frees_the_search_and_what_a_model_writes_is_text(chromium, tmp_path, endless):
    url, engine = endless
    with Page(chromium, f"{url}/", tmp_path / "profile") as page:
        fill(page, max_steps=200)
        page.evaluate("at('start').focus()")
        page.press("Enter")
        page.wait("view.nodes.size > 20")
        assert page.evaluate("document.activeElement.id") == "cancel"
        page.evaluate("view.choose(view.order[2], true)")
        many = page.evaluate("view.nodes.size")
        page.wait(f"view.nodes.size > {many + 20}")
        assert page.evaluate("Number(document.activeElement.dataset.id) === view.chosen")  # it grows under the focus
        page.click("#cancel")
        page.wait("document.getElementById('status').textContent === 'Cancelled.'")
        page.evaluate("view.choose(view.order[1])")
        assert "<img" in page.evaluate("document.querySelector('#detail pre').textContent")
        assert page.evaluate("document.querySelectorAll('#detail img, main script').length") == 0
        assert page.evaluate("document.title") == "tts-search"
        freed(engine)
        assert page.complaints == []


@pytest.mark.slow
def test_a_reload_frees_the_search_and_keeps_what_was_typed(chromium, tmp_path, endless):
    url, engine = endless
    with Page(chromium, f"{url}/", tmp_path / "profile") as page:
        fill(page, max_steps=200, n=12)
        page.evaluate("at('form').requestSubmit()")
        page.wait("view.nodes.size > 20")
        page.evaluate("var old = true")
        page.call("Page.reload")
        page.wait(f"!window.old && {OPTIONS}")
        freed(engine)
        fields = page.evaluate("['problem', 'max_steps', 'n'].map(one => at(one).value)")
        assert fields == [PROBLEM, "200", "12"]
        assert page.evaluate("[view.nodes.size, at('status').textContent]") == [0, "Ready."]
        page.click("#start")
        page.wait("view.nodes.size > 20")
        page.click("#cancel")
        page.wait("at('status').textContent === 'Cancelled.'")
        freed(engine)
        assert page.complaints == []
