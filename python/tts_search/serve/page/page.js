"use strict";
// The page: sends a problem to /v1/search and draws what comes back while it comes.

const at = id => document.getElementById(id);
const FIELDS = ["problem", "method", "n", "temperature", "max_steps", "max_step_tokens", "seed"];
const WHOLE = ["best_of_n", "budget_forcing"];  // methods that have no steps to bound
let view = null, running = null, begun = 0, clock = null;

const headers = () => at("key").value ? {Authorization: `Bearer ${at("key").value}`} : {};

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

/** Yield the events of a stream as {event, data}. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n"), field = name => lines.filter(line => line.startsWith(`${name}: `)).map(line => line.slice(name.length + 2)).join("\n");
      if (field("data")) yield {event: field("event"), data: JSON.parse(field("data"))};
    }
  }
}

function request() {
  const body = {problem: at("problem").value, stream: true, method: at("method").value, n: Number(at("n").value),
    temperature: Number(at("temperature").value), max_step_tokens: Number(at("max_step_tokens").value)};
  if (!WHOLE.includes(body.method)) body.max_steps = Number(at("max_steps").value);
  if (at("seed").value !== "") body.seed = Number(at("seed").value);
  return body;
}

async function search() {
  view.clear();
  view.update([{id: 0, parent: null, round: 0, text: "", scores: [], score: null, state: "expanded", num_tokens: 0}]);
  at("answer").replaceChildren();
  at("detail").replaceChildren(...stepDetail(null, []));
  at("read").textContent = "-";
  count(0);
  running = new AbortController();
  begun = performance.now();
  clock = setInterval(tick, 100);
  busy(true);
  say("Searching ...");
  try {
    const response = await fetch("v1/search", {method: "POST", signal: running.signal,
      headers: {"Content-Type": "application/json", ...headers()}, body: JSON.stringify(request())});
    if (response.status === 401) at("key-label").hidden = false;
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const {event, data} of events(response)) show(event, data);
  } catch (error) {
    say(error.name === "AbortError" ? "Cancelled." : `Error: ${visible(error.message)}`, error.name !== "AbortError");
  } finally {
    clearInterval(clock);
    tick();
    busy(false);
    running = null;
  }
}

function show(event, data) {
  if (event === "error") throw new Error(data.error.message);
  if (event === "result") return finish(data);
  view.update(data.nodes);
  count(data.round);
  if (event === "round") say(`Round ${data.round}: ${view.nodes.size - 1} steps so far.`);
}

function finish(result) {
  view.update(result.tree.nodes);
  count(result.stats.rounds);
  at("read").textContent = result.stats.verifier_tokens;
  const make = (tag, text) => Object.assign(document.createElement(tag), {textContent: text});
  const leaf = result.best_node === null ? null : view.nodes.get(result.best_node);
  if (leaf) view.mark(leaf.id);
  at("answer").replaceChildren(make("h2", "Answer"), make("p", visible(result.answer) || "none"),
    make("p", `${result.completions.length} completions, seed ${result.seed}`));
  if (leaf) view.choose(leaf.id);
  say(`Done: ${result.completions.length} completions. Answer: ${visible(result.answer) || "none"}.`);
}

function count(round) {
  const nodes = [...view.nodes.values()].sort((one, other) => one.id - other.id), {unique, logical} = tokenCounts(nodes);
  at("round").textContent = round;
  at("steps").textContent = view.nodes.size - 1;
  at("tokens").textContent = unique;
  at("unique").textContent = unique;
  at("logical").textContent = logical;
}

function tick() {
  at("seconds").textContent = ((performance.now() - begun) / 1000).toFixed(1);
}

function busy(is) {
  at("start").disabled = is;
  at("cancel").disabled = !is;
}

async function setUp() {
  view = new TreeView(at("tree"), (...chosen) => at("detail").replaceChildren(...stepDetail(...chosen)));
  at("detail").replaceChildren(...stepDetail(null, []));
  const about = await (await fetch("page/about.json")).json();
  at("model").textContent = about.verifier ? `${about.policy}, scored by ${about.verifier}` : `${about.policy}, without a verifier`;
  at("key-label").hidden = !about.needs_key;
  for (const method of about.methods) at("method").append(new Option(method.replaceAll("_", " "), method));
  for (const name of FIELDS) {
    const kept = sessionStorage.getItem(name);
    if (kept !== null) at(name).value = kept;
    at(name).addEventListener("change", () => sessionStorage.setItem(name, at(name).value));
  }
  at("max_steps").disabled = WHOLE.includes(at("method").value);
  at("method").addEventListener("change", () => { at("max_steps").disabled = WHOLE.includes(at("method").value); });
  at("form").addEventListener("submit", event => { event.preventDefault(); if (!running) search(); });
  at("cancel").addEventListener("click", () => running && running.abort());
}

setUp().catch(error => say(`Error: ${error.message}`, true));
