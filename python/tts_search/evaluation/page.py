"""One HTML page, complete in itself, on which the search trees of an evaluation can be explored.

What a model wrote is data: it is in the page as JSON without a single angle bracket, the script shows it as text only,
control characters that could reorder what is on screen are made visible, and a content security policy lets no other
script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tts_search.evaluation.records import Record

__all__ = ["VIEW", "tree_page"]

VIEW = Path(__file__).parent / "view"
"""The drawing of a tree, which the server's page shows, too."""

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u061c\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def tree_page(records: Iterable[Record], *, max_trees: int = 300) -> str:
    """Return the page for up to `max_trees` records that hold a search tree: the first ones of each experiment in turn.

    It shows the steps, their scores, what was pruned when and why, round by round, and how many branches share the KV
    cache of a step.
    """
    grown = [record for record in records if record.tree is not None]
    searches = [_search(record) for record in _dealt(grown, max_trees)]
    data = json.dumps(searches, ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return (
        _PAGE.replace("@STYLE@", _STYLE)
        .replace("@DIGEST@", digest)
        .replace("@SCRIPT@", _SCRIPT)
        .replace("@COUNT@", f"{len(searches)} of {len(grown)}" if len(searches) < len(grown) else str(len(grown)))
        .replace("@DATA@", data)  # last: nothing in it is replaced any more
    )


def _dealt(records: Sequence[Record], count: int) -> list[Record]:
    """Choose `count` records, as many of each experiment as of the others if it has so many; they stay in order."""
    turns: Counter[str] = Counter()
    places = []
    for place, record in enumerate(records):
        places.append((turns[record.experiment], place))
        turns[record.experiment] += 1
    return [records[place] for place in sorted(place for _, place in sorted(places)[:count])]


def _search(record: Record) -> dict[str, Any]:
    assert record.tree is not None
    vote = "prm_max" if "prm_max" in record.answers else "majority"
    facts = {
        "title": f"{record.label}: {record.task}",
        "problem": record.problem,
        "gold": record.gold,
        "answer": record.answers.get(vote, ""),
        "right": record.is_correct(vote),
        "models": ", ".join(name for name in record.models if name),
        "nodes": json.loads(record.tree)["nodes"],
    }
    shown: dict[str, Any] = _visible(facts)
    return shown


def _visible(value: Any) -> Any:
    """Show hidden characters as U+FFFD, in all texts of a JSON value."""
    if isinstance(value, str):
        return _HIDDEN.sub("\ufffd", value)
    if isinstance(value, list):
        return [_visible(item) for item in value]
    if isinstance(value, dict):
        return {name: _visible(item) for name, item in value.items()}
    return value


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-@DIGEST@'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Search trees</title>
<style>@STYLE@</style>
</head>
<body>
<header>
<h1>Search trees</h1>
<label>Find <input id="find" type="search" placeholder="method, task, problem"></label>
<label>Search <select id="search"></select></label>
<label>Round <input id="round" type="range" min="0" value="0"> <output id="at"></output></label>
<label><input id="pruned" type="checkbox" checked> pruned ones, too</label>
</header>
<section id="facts"></section>
<main><ul id="tree" role="tree"></ul><aside id="detail" aria-live="polite"></aside></main>
<footer>@COUNT@ searches. <span class="key finished">finished</span> <span class="key expanded">went on</span>
<span class="key pruned">pruned</span> <span class="key open">open</span>
A number &times;k: k branches below share the step and its KV cache.</footer>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --finished: #2a8f4c; --pruned: #b5483a; --expanded: #3569b5; --open: #888; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 0; display: flex; flex-direction: column; height: 100vh; }
header { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; padding: .5rem 1rem; }
header, #facts { border-bottom: 1px solid var(--line); }
h1 { font-size: 1rem; margin: 0; }
select { max-width: 26rem; }
#facts { padding: .4rem 1rem; }
#facts p { margin: .1rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
main { flex: 1; display: flex; min-height: 0; }
#tree { flex: 3; overflow: auto; margin: 0; padding: .6rem 1rem; }
#detail { flex: 2; overflow: auto; border-left: 1px solid var(--line); padding: .6rem 1rem; }
ul { list-style: none; padding-left: 1.1rem; border-left: 1px solid var(--line); }
#tree { border-left: 0; }
.row { display: flex; gap: .4rem; align-items: baseline; }
button { font: inherit; border: 0; background: none; color: inherit; text-align: left; cursor: pointer; padding: .05rem .2rem; }
.fold { width: 1.2rem; }
.node { display: flex; gap: .5rem; align-items: baseline; border-radius: 4px; min-width: 0; }
.node:hover, .node:focus-visible { background: #8882; }
.node[aria-pressed=true] { background: #8884; }
.score { font-variant-numeric: tabular-nums; border-left: .3rem solid var(--open); padding-left: .3rem; }
.finished .score, .key.finished { border-color: var(--finished); }
.expanded .score, .key.expanded { border-color: var(--expanded); }
.pruned .score, .key.pruned { border-color: var(--pruned); }
.key { border-left: .3rem solid var(--open); padding-left: .3rem; margin-right: .5rem; }
.pruned .text { opacity: .6; text-decoration: line-through; text-decoration-color: #8888; }
.text { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; max-width: 34rem; unicode-bidi: isolate; }
.shared { opacity: .7; font-size: .85em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .5rem; unicode-bidi: isolate; margin: .2rem 0 .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0 0 .8rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
footer { border-top: 1px solid var(--line); padding: .3rem 1rem; font-size: .85em; }
"""

_SCRIPT = """
"use strict";
const searches = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};
const prunedIn = node => node.pruned_in ?? node.round;  // trees of before do not say
const stateAt = (node, round) => node.state === "pruned" && prunedIn(node) > round ? "open" : node.state;
const number = value => typeof value === "number" ? value.toFixed(3) : "-";
let current = null, folded = new Set(), chosen = null;

function list() {
  const words = at("find").value.toLowerCase();
  at("search").replaceChildren();
  searches.forEach((one, index) => {
    if (!(one.title + " " + one.problem + " " + one.models).toLowerCase().includes(words)) return;
    const option = make("option", "", (one.right ? "\\u2713 " : "\\u2717 ") + one.title);
    option.value = index;
    at("search").append(option);
  });
  open();
}

function open() {
  current = searches[at("search").value] || null;
  folded = new Set();
  chosen = null;
  at("detail").replaceChildren();
  at("facts").replaceChildren();
  if (current) {
    current.children = current.nodes.map(() => []);
    current.nodes.forEach(node => { if (node.parent !== null) current.children[node.parent].push(node.id); });
    const rounds = Math.max(...current.nodes.map(node => node.round));
    at("round").max = rounds;
    at("round").value = rounds;
    at("facts").append(
      make("p", "", current.problem),
      make("p", "", "right: " + current.gold + "   this search: " + (current.answer || "no answer") + "   models: " + current.models));
    at("facts").append(make("p", "shared", sharing()));
  }
  draw();
}

function sharing() {
  let unique = 0, logical = 0;
  const length = current.nodes.map(() => 0);
  current.nodes.forEach(node => {
    if (node.parent === null) return;
    length[node.id] = length[node.parent] + node.num_tokens;
    unique += node.num_tokens;
    if (!current.children[node.id].length) logical += length[node.id];
  });
  return unique + " tokens sampled; " + logical + " if no branch shared what is before it";
}

function draw() {
  at("tree").replaceChildren();
  at("at").textContent = at("round").value + " of " + at("round").max;
  if (!current) return;
  const last = Number(at("round").value), all = at("pruned").checked;
  const shown = current.nodes.map(node => node.round <= last && (all || stateAt(node, last) !== "pruned"));
  const below = current.nodes.map(() => 0);
  for (let id = current.nodes.length - 1; id > 0; id--) {
    if (!shown[id]) continue;
    below[id] = below[id] || 1;
    below[current.nodes[id].parent] += below[id];
  }
  const items = [at("tree")];
  current.nodes.forEach(node => {
    if (node.parent === null || !shown[node.id] || !items[node.parent]) return;
    const item = make("li");
    item.setAttribute("role", "treeitem");
    const row = make("div", "row"), kept = current.children[node.id].filter(id => shown[id]);
    const fold = make("button", "fold", kept.length ? (folded.has(node.id) ? "\\u25b8" : "\\u25be") : "");
    fold.disabled = !kept.length;
    fold.setAttribute("aria-label", "fold");
    fold.onclick = () => { folded.has(node.id) ? folded.delete(node.id) : folded.add(node.id); draw(); };
    const button = make("button", "node " + stateAt(node, last));
    button.dataset.id = node.id;
    button.setAttribute("aria-pressed", String(node.id === chosen));
    button.append(make("span", "score", number(node.score)), make("span", "text", node.text.trim() || "(no text)"));
    if (below[node.id] > 1) button.append(make("span", "shared", "\\u00d7" + below[node.id]));
    button.onclick = () => { chosen = node.id; detail(node, below[node.id]); draw(); };
    row.append(fold, button);
    item.append(row);
    at(node.parent === 0 ? "tree" : "under" + node.parent).append(item);
    items[node.id] = !folded.has(node.id);
    if (items[node.id] && kept.length) {
      const list = make("ul");
      list.id = "under" + node.id;
      list.setAttribute("role", "group");
      item.append(list);
    }
  });
}

function detail(node, below) {
  const path = [];
  for (let one = node; one.parent !== null; one = current.nodes[one.parent]) path.unshift(one);
  const facts = make("dl");
  const fact = (name, value) => facts.append(make("dt", "", name), make("dd", "", value));
  fact("state", node.state);
  if (node.why) fact("pruned in round " + prunedIn(node), node.why);
  fact("round", node.round);
  fact("score", number(node.score));
  fact("scores of its steps", node.scores.map(number).join("  ") || "-");
  fact("tokens", node.num_tokens + ", " + path.reduce((sum, one) => sum + one.num_tokens, 0) + " with those before it");
  if (below > 1) fact("shared KV", below + " branches read its " + node.num_tokens + " tokens: " + (below - 1) * node.num_tokens + " saved");
  at("detail").replaceChildren(facts, make("h2", "", "Step"), make("pre", "", node.text), make("h2", "", "Branch"),
    make("pre", "", path.map(one => one.text).join("")));
}

at("find").oninput = list;
at("search").onchange = open;
at("round").oninput = draw;
at("pruned").onchange = draw;
list();
"""
