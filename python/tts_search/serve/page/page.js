"use strict";
// The page: sends a problem to /v1/search and draws what comes back while it comes.

const at = id => document.getElementById(id);
const FIELDS = ["problem", "method", "n", "temperature", "max_steps", "max_step_tokens", "seed"];
const WHOLE = ["best_of_n", "budget_forcing"];  // methods that have no steps to bound
const NOTHING = {policy_tokens: 0, verifier_tokens: 0, unique_kv_tokens: 0, logical_kv_tokens: 0, peak_unique_kv_tokens: 0, peak_logical_kv_tokens: 0};
let view = null, running = null, begun = 0, clock = null, scored = false;

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
  count(0, NOTHING);
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
  count(data.round, data.usage);
  if (event === "round") say(`Round ${data.round}: ${view.nodes.size - 1} steps so far.`);
}

function finish(result) {
  view.update(result.tree.nodes);
  count(result.stats.rounds, {...NOTHING, ...result.stats});  // the search holds no KV any more
  const make = (tag, text) => Object.assign(document.createElement(tag), {textContent: text});
  const leaf = result.best_node === null ? null : view.nodes.get(result.best_node);
  if (leaf) view.mark(leaf.id);
  at("answer").replaceChildren(make("h2", "Answer"), make("p", visible(result.answer) || "none"),
    make("p", `${result.completions.length} completions, seed ${result.seed}`));
  if (leaf) view.choose(leaf.id);
  say(`Done: ${result.completions.length} completions. Answer: ${visible(result.answer) || "none"}.`);
}

/** Show what the search has cost so far, as the server counts it. */
function count(round, usage) {
  at("round").textContent = round;
  at("steps").textContent = view.nodes.size - 1;
  at("tokens").textContent = usage.policy_tokens;
  at("unique").textContent = `${usage.unique_kv_tokens}, at most ${usage.peak_unique_kv_tokens}`;
  at("logical").textContent = `${usage.logical_kv_tokens}, at most ${usage.peak_logical_kv_tokens}`;
  at("read").textContent = scored ? usage.verifier_tokens : "-";
}

function tick() {
  at("seconds").textContent = ((performance.now() - begun) / 1000).toFixed(1);
}

function busy(is) {
  const [off, on] = is ? [at("start"), at("cancel")] : [at("cancel"), at("start")], held = document.activeElement === off;
  on.disabled = false;
  off.disabled = true;
  if (held) on.focus();  // who works with the keyboard stays at the buttons
}

async function setUp() {
  view = new TreeView(at("tree"), (...chosen) => at("detail").replaceChildren(...stepDetail(...chosen)));
  at("detail").replaceChildren(...stepDetail(null, []));
  const about = await (await fetch("page/about.json")).json();
  at("model").textContent = about.verifier ? `${about.policy}, scored by ${about.verifier}` : `${about.policy}, without a verifier`;
  scored = about.verifier !== null;
  at("key-label").hidden = !about.needs_key;
  for (const method of about.methods) at("method").append(new Option(method.replaceAll("_", " "), method));
  for (const name of FIELDS) {  // a reload keeps what was typed; a search that ran is cancelled, and can be started again
    const kept = sessionStorage.getItem(name);
    if (kept !== null && (name !== "method" || about.methods.includes(kept))) at(name).value = kept;
    at(name).addEventListener("input", () => sessionStorage.setItem(name, at(name).value));
  }
  at("max_steps").disabled = WHOLE.includes(at("method").value);
  at("method").addEventListener("change", () => { at("max_steps").disabled = WHOLE.includes(at("method").value); });
  at("form").addEventListener("submit", event => { event.preventDefault(); if (!running) search(); });
  at("cancel").addEventListener("click", () => running && running.abort());
}

setUp().catch(error => say(`Error: ${error.message}`, true));
