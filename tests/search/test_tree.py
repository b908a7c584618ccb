from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import RandomTree, ScriptedPolicy, ScriptedVerifier, by_name, score_names
from tts_search import SearchConfig, SearchTree, TreeNode, search
from tts_search.evaluation.outline import outline
from tts_search.terminal import sanitize

FLOATS = st.one_of(st.floats(allow_nan=False), st.just(math.nan))
NODES = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.text(),
        st.lists(FLOATS).map(tuple),
        FLOATS,
        st.sampled_from(["expanded", "pruned", "finished", "open"]),
    ),
    max_size=12,
)


def make_tree(entries) -> SearchTree:
    nodes = [TreeNode(0, None, 0, "", (), math.nan, "expanded", 0)]
    for index, (number, text, scores, score, state) in enumerate(entries, start=1):
        parent = nodes[number % index]
        nodes.append(TreeNode(index, parent.id, parent.round + 1, text, scores, score, state, number))
    return SearchTree(tuple(nodes))


@given(NODES)
def test_json_round_trip(entries):
    tree = make_tree(entries)
    text = tree.to_json()
    assert SearchTree.from_json(text) == tree
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@given(NODES, st.integers(0, 15))
@settings(max_examples=50)
def test_outline_of_any_tree(entries, max_nodes):
    tree = make_tree(entries)
    lines = outline(tree, max_nodes=max_nodes, width=60).split("\n")
    assert lines[0].startswith("problem")
    assert all(len(line) <= 60 and line == sanitize(line) for line in lines)
    assert len(lines) - 1 <= max(max_nodes, 12 if max_nodes < 12 else max_nodes)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "nodes": []}', '{"format": 1, "nodes": [{"id": 0}]}', '{"format": 1}']
)
def test_from_json_of_something_else(text):
    with pytest.raises(ValueError, match=r"^text: expected"):
        SearchTree.from_json(text)


def test_from_json_of_a_broken_tree():
    data = json.loads(make_tree([(0, "a", (), 0.5, "open")]).to_json())
    for change in ({"parent": 1}, {"parent": None}, {"id": 5}, {"state": "lost"}, {"score": "big"}):
        broken = {**data, "nodes": [data["nodes"][0], {**data["nodes"][1], **change}]}
        with pytest.raises(ValueError, match=r"^text: expected"):
            SearchTree.from_json(json.dumps(broken))


def searched() -> SearchTree:
    step_fn = by_name(finished=["2.0"])
    policy, verifier = ScriptedPolicy(step_fn), ScriptedVerifier(score_names({"1": 0.5, "2": 0.75, "2.0": 1.0}))
    config = SearchConfig(n=4, expand=2, max_steps=2)
    return search(["p"], policy, verifier, config, progress=False)[0].tree


def test_a_node_says_which_round_pruned_it():
    """Branch 0 finishes in round 1 and keeps its place until better ones come; 1 loses at once."""
    scores = {"0": 0.5, "1": 0.1, "2": 0.4, "3": 0.2, "2.0": 0.9, "2.1": 0.8}
    verifier = ScriptedVerifier(score_names(scores))
    config = SearchConfig(n=4, expand=2, max_steps=3, completed="compete")
    (result,) = search(["p"], ScriptedPolicy(by_name(finished=["0"])), verifier, config, progress=False)
    first, second, third, fourth = result.tree.nodes[1:5]
    assert (first.state, first.round, first.pruned_in) == ("pruned", 1, 2)
    assert (second.state, second.pruned_in) == (fourth.state, fourth.pruned_in) == ("pruned", 1)
    assert (third.state, third.pruned_in) == ("expanded", None)
    assert SearchTree.from_json(result.tree.to_json()) == result.tree


def test_nodes_of_a_search():
    tree = searched()
    assert [(node.id, node.parent, node.round, node.state) for node in tree.nodes] == [
        (0, None, 0, "expanded"),
        (1, 0, 1, "pruned"),
        (2, 0, 1, "expanded"),
        (3, 0, 1, "expanded"),
        (4, 0, 1, "pruned"),
        (5, 2, 2, "finished"),
        (6, 3, 2, "finished"),
        (7, 2, 2, "finished"),
        (8, 3, 2, "finished"),
    ]
    assert tree.nodes[6].scores == (0.75, 1.0)
    assert [node.id for node in tree.path(6)] == [3, 6]
    assert tree.path(0) == []
    assert [node.id for node in tree.children(2)] == [5, 7]
    assert sum(node.num_tokens for node in tree.nodes) == 8


def test_outline():
    assert outline(searched()) == "\n".join(
        [
            "problem",
            "├─x 0.000 0",
            "├─  0.500 1",
            "│ ├─* 0.000 end 1.0",
            "│ └─* 0.000 end 1.1",
            "├─  0.750 2",
            "│ ├─* 1.000 end 2.0",
            "│ └─* 0.000 end 2.1",
            "└─x 0.000 3",
        ]
    )
    assert outline(searched(), max_nodes=3) == "\n".join(
        ["problem  (+2 more)", "├─x 0.000 0", "└─  0.750 2  (+1 more)", "  └─* 1.000 end 2.0"]
    )


def test_tree_of_a_random_search_survives_json():
    for method in ("best_of_n", "beam_search", "dvts"):
        tree = RandomTree(4, end=0.3, length=0.1)
        config = SearchConfig(max_steps=4).with_method(method)
        result = search(["p"], ScriptedPolicy(tree.step), ScriptedVerifier(tree.scores), config, progress=False)[0]
        assert SearchTree.from_json(result.tree.to_json()) == result.tree
    unscored = search(["p"], ScriptedPolicy(tree.step), None, SearchConfig(method="best_of_n"), progress=False)[0].tree
    assert SearchTree.from_json(unscored.to_json()) == unscored


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain\ttext\nwith ünïcödé 数学", "plain\ttext\nwith ünïcödé 数学"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b[1;1Hgone", "gone"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://example.com\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"),
        ("\x1bP1;2|data\x1b\\after", "after"),
        ("over\rwrite\b\b\x7f", "overwrite"),
        ("\x1b", ""),
        ("a\u202eb\u2066c\u2028d", "abcd"),
        ("\ud800", ""),
    ],
)
def test_sanitize(text, clean):
    assert sanitize(text) == clean


@given(st.text(alphabet=st.sampled_from("\x1b[]0;m\x07\x9b\x9d\\Pab\x00\r\u202e")))
def test_sanitized_text_holds_no_control_characters(text):
    assert not set(sanitize(text)) & set("\x1b\x07\x9b\x9d\x00\r\u202e")


def test_nodes_without_a_score_are_equal() -> None:
    def node(score: float) -> TreeNode:
        return TreeNode(0, None, 0, "", (), score, "expanded", 0)

    assert node(float("nan")) == node(float("nan"))
    assert hash(node(float("nan"))) == hash(node(float("nan")))
    assert node(float("nan")) != node(0.5)
    assert node(0.5) != 0.5
