"use strict";
// A search tree as a drawing: rounds from left to right, colour by score, one shape for each state. It can be walked by
// the arrow keys, and each node says to a screen reader what it is. Texts are models' words: they are only ever text.

const SVG = "http://www.w3.org/2000/svg";
const HIDDEN = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u061c\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/g;
const COLUMN = [44, 110], ROW = [9, 26], TALLEST = 17, MARGIN = 18, RADIUS = 6;  // columns and rows at least and at most

/** A text with the characters shown that could hide or reorder others. */
const visible = text => text.replace(/[\ud800-\udbff][\udc00-\udfff]|[^]/g, one => one.length > 1 ? one : one.replace(HIDDEN, "\ufffd"));

/** A score as text; of a score that is none, a dash. */
const scoreText = score => typeof score === "number" ? score.toFixed(3) : "-";

/** What a drawing of a state looks like, as the path of a shape of about 12 pixels. */
const SHAPES = {
  expanded: "M-6,0a6,6 0 1,0 12,0a6,6 0 1,0 -12,0",
  open: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0",
  finished: "M0,-8L8,0L0,8L-8,0Z",
  pruned: "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0Z",
};

class TreeView {
  /**
   * @param {HTMLElement} box where it is drawn
   * @param {(node: object, path: object[], below: number) => void} onChoose told of the node that is looked at, the
   *   nodes on the way to it, and how many branches go through it
   */
  constructor(box, onChoose) {
    this.box = box;
    this.onChoose = onChoose;
    this.svg = this._make("svg", {role: "tree", "aria-label": "Search tree"});
    this.svg.append(this._make("g", {class: "edges", "aria-hidden": "true"}), this._make("g", {class: "nodes", role: "none"}));
    this.svg.addEventListener("keydown", event => this._key(event));
    box.replaceChildren(this.svg);
    this.clear();
  }

  /** Forget all nodes. */
  clear() {
    this.nodes = new Map();
    this.drawn = new Map();
    this.order = [];
    this.path = new Set();
    this.chosen = null;
    for (const group of this.svg.children) group.replaceChildren();
    this._layout();
  }

  /** Take new nodes in, and what has become of others. */
  update(nodes) {
    for (const node of nodes) this.nodes.set(node.id, node);
    this._layout();
  }

  /** Mark the way to a node. */
  mark(id) {
    this.path = new Set(this.pathTo(id).map(node => node.id));
    this._layout();
  }

  /** The nodes on the way to one, the root apart. */
  pathTo(id) {
    const path = [];
    for (let node = this.nodes.get(id); node && node.parent !== null; node = this.nodes.get(node.parent)) path.unshift(node);
    return path;
  }

  /** Look at a node. */
  choose(id, focus = false) {
    const before = this.drawn.get(this.chosen ?? 0), now = this.drawn.get(id);  // as yet the root can be reached by Tab
    if (!now) return;
    if (before) this._attributes(before.shape, {tabindex: -1, "aria-selected": "false"});
    this._attributes(now.shape, {tabindex: 0, "aria-selected": "true"});
    this.chosen = id;
    if (focus) now.shape.focus();
    this.onChoose(this.nodes.get(id), this.pathTo(id), this._branchesBelow(id));
  }

  /** How many branches end below a node, or at it. */
  _branchesBelow(id) {
    const through = new Set([id]), parents = new Set();
    for (const at of this.order) {  // parents come before children
      const {parent} = this.nodes.get(at);
      if (through.has(parent)) through.add(at);
      parents.add(parent);
    }
    return [...through].filter(at => !parents.has(at)).length;
  }

  /** Where everything goes: leaves one below the other, parents in the middle of their children. */
  _layout() {
    const children = new Map();
    for (const node of this.nodes.values()) {
      if (node.parent === null) continue;
      if (!children.has(node.parent)) children.set(node.parent, []);
      children.get(node.parent).push(node.id);
    }
    this.order = [];
    const places = new Map(), stack = [[0, 0, false]];
    let leaves = 0, deepest = 0;
    while (this.nodes.has(0) && stack.length) {
      const [id, depth, done] = stack.pop(), below = children.get(id) || [];
      if (done) {
        places.get(id).row = (places.get(below[0]).row + places.get(below[below.length - 1]).row) / 2;
        continue;
      }
      this.order.push(id);
      deepest = Math.max(deepest, depth);
      places.set(id, {depth, row: leaves});
      if (!below.length) leaves += 1;
      else stack.push([id, depth, true]);
      for (const child of [...below].reverse()) stack.push([child, depth + 1, false]);
    }
    const fit = ([least, most], room, count) => Math.max(least, Math.min(most, room / Math.max(1, count)));
    const row = fit(ROW, this.box.clientHeight - 2 * MARGIN, leaves);
    const column = fit(COLUMN, this.box.clientWidth - 2 * MARGIN - RADIUS, deepest);
    this._attributes(this.svg, {width: deepest * column + 2 * MARGIN + RADIUS, height: leaves * row + 2 * MARGIN});
    const at = ({depth, row: line}) => [MARGIN + depth * column, MARGIN + (line + 0.5) * row];
    const scale = Math.min(1, row / TALLEST);  // so that neighbours do not overlap
    for (const id of this.order) this._draw(id, places, at, scale, (children.get(id) || []).length);
    this._arrange();
    for (const [id, {shape, edge}] of this.drawn) {
      if (places.has(id)) continue;
      shape.remove();
      if (edge) edge.remove();
      this.drawn.delete(id);
    }
  }

  /** Bring the nodes into the order in which they are read. None is moved without need: it would lose the focus. */
  _arrange() {
    const group = this.svg.children[1];
    let next = group.firstChild;
    for (const id of this.order) {
      const {shape} = this.drawn.get(id);
      if (shape === next) next = next.nextSibling;
      else group.insertBefore(shape, next);
    }
  }

  _draw(id, places, at, scale, size) {
    const node = this.nodes.get(id), [edges] = this.svg.children;
    if (!this.drawn.has(id)) {
      const shape = this._make("path", {role: "treeitem", tabindex: this.drawn.size ? -1 : 0, "data-id": id, "aria-selected": "false"});
      shape.addEventListener("click", () => this.choose(id, true));
      shape.append(this._make("title", {}));
      this.drawn.set(id, {shape, edge: node.parent === null ? null : this._make("path", {})});
    }
    const {shape, edge} = this.drawn.get(id), [x, y] = at(places.get(id));
    const state = node.parent === null ? "expanded" : node.state;
    this._attributes(shape, {
      d: SHAPES[state],
      transform: `translate(${x.toFixed(1)},${y.toFixed(1)}) scale(${scale.toFixed(2)})`,
      class: `node ${state}${this.path.has(id) ? " best" : ""}`,
      fill: state === "open" ? "none" : this._colour(node.score),
      stroke: this._colour(node.score),
      "aria-level": places.get(id).depth + 1,
      "aria-label": this._label(node),
    });
    if (size) shape.setAttribute("aria-expanded", "true");
    shape.firstChild.textContent = this._label(node);
    if (!edge) return;
    const [px, py] = at(places.get(node.parent)), middle = (px + x) / 2;
    this._attributes(edge, {
      d: `M${px},${py}C${middle},${py} ${middle},${y} ${x},${y}`,
      class: `edge ${state}${this.path.has(id) ? " best" : ""}`,
    });
    if (!edge.parentNode) edges.append(edge);
  }

  /** From blue (good) over grey to orange (bad), which all eyes tell apart; grey without a score. */
  _colour(score) {
    if (typeof score !== "number") return "hsl(0 0% 55%)";
    const value = score >= 0 && score <= 1 ? score : 1 / (1 + Math.exp(-score));
    return value >= 0.5 ? `hsl(212 ${Math.round(140 * (value - 0.5) + 10)}% 50%)` : `hsl(28 ${Math.round(150 * (0.5 - value) + 10)}% 50%)`;
  }

  _label(node) {
    if (node.parent === null) return "problem";
    const text = visible(node.text).trim().replace(/\s+/g, " ");
    const best = this.path.has(node.id) ? ", on the best path" : "";
    return `step of round ${node.round}, ${node.state}${best}, score ${scoreText(node.score)}: ${text.slice(0, 160) || "no text"}`;
  }

  _key(event) {
    const at = this.chosen ?? 0, node = this.nodes.get(at), place = this.order.indexOf(at);
    const to = {
      ArrowDown: this.order[place + 1],
      ArrowUp: this.order[place - 1],
      ArrowLeft: node && node.parent,
      ArrowRight: this.order[place + 1] !== undefined && this.nodes.get(this.order[place + 1]).parent === at ? this.order[place + 1] : undefined,
      Home: this.order[0],
      End: this.order[this.order.length - 1],
      Enter: at,
      " ": at,
    };
    if (!(event.key in to) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    if (to[event.key] !== undefined && to[event.key] !== null) this.choose(to[event.key], true);
  }

  _make(name, attributes) {
    const element = document.createElementNS(SVG, name);
    this._attributes(element, attributes);
    return element;
  }

  _attributes(element, attributes) {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  }
}

/** What is known of a step through which so many branches go, its text and the text up to its end, as elements. */
function stepDetail(node, path, below = 1) {
  const make = (tag, text) => Object.assign(document.createElement(tag), {textContent: text});
  if (!node || node.parent === null) return [make("p", "The problem. Choose a step to read it.")];
  const tokens = path.reduce((sum, one) => sum + one.num_tokens, 0);
  const facts = document.createElement("dl");
  const fact = (name, value) => facts.append(make("dt", name), make("dd", value));
  fact("state", node.state);
  if (node.why) fact(node.state === "pruned" ? `pruned in round ${node.pruned_in ?? node.round}` : "because", visible(node.why));
  fact("round", String(node.round));
  fact("score", scoreText(node.score));
  fact("scores of its steps", node.scores.map(scoreText).join("  ") || "-");
  fact("tokens", `${node.num_tokens}, ${tokens} with those before it`);
  if (below > 1) fact("shared KV", `${below} branches read its ${node.num_tokens} tokens: ${(below - 1) * node.num_tokens} saved`);
  return [facts, make("h3", "Step"), make("pre", visible(node.text)), make("h3", "Branch"),
    make("pre", visible(path.map(one => one.text).join("")))];
}

/** Tokens sampled, and those that branches would hold if none shared what is before it. */
function tokenCounts(nodes) {
  const length = new Map(), parents = new Set();
  let unique = 0, logical = 0;
  for (const node of nodes) {  // parents come before children
    length.set(node.id, (length.get(node.parent) || 0) + node.num_tokens);
    unique += node.num_tokens;
    parents.add(node.parent);
  }
  for (const node of nodes) if (!parents.has(node.id)) logical += length.get(node.id);
  return {unique, logical};
}
