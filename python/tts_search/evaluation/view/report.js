// The report's page: which of the searches is drawn, and how far it had come.

const at = id => document.getElementById(id);
const searches = JSON.parse(at("data").textContent);
const prunedIn = node => node.pruned_in ?? node.round;  // trees of before do not say
const view = new TreeView(at("tree"), (node, path, below) => at("detail").replaceChildren(...stepDetail(node, path, below)));
let current = null;

/** A node as it was after a round. */
const after = (node, round) => node.state === "pruned" && prunedIn(node) > round ? {...node, state: "open"} : node;

/** Where the finished answer of the highest score ends, the first of those; null if there is none. */
function bestLeaf(nodes) {
  const ends = nodes.filter(node => node.state === "finished" && typeof node.score === "number");
  return ends.reduce((best, node) => best === null || node.score > best.score ? node : best, null);
}

function list() {
  const words = at("find").value.toLowerCase();
  at("search").replaceChildren();
  searches.forEach((one, index) => {
    if (!`${one.title} ${one.problem} ${one.models}`.toLowerCase().includes(words)) return;
    at("search").append(new Option((one.right ? "\u2713 " : "\u2717 ") + one.title, index));
  });
  open();
}

function open() {
  current = searches[at("search").value] || null;
  at("facts").replaceChildren();
  if (current) {
    const rounds = Math.max(...current.nodes.map(node => node.round));
    at("round").max = rounds;
    at("round").value = rounds;
    const say = text => at("facts").append(Object.assign(document.createElement("p"), {textContent: text}));
    const {unique, logical} = tokenCounts(current.nodes);
    say(current.problem);
    say(`right: ${current.gold}   this search: ${current.answer || "no answer"}   models: ${current.models}`);
    say(`${unique} tokens sampled; ${logical} if no branch shared what is before it`);
  }
  draw();
}

function draw() {
  view.clear();
  at("detail").replaceChildren(...stepDetail(null, []));
  at("at").textContent = `${at("round").value} of ${at("round").max}`;
  if (!current) return;
  const last = Number(at("round").value), all = at("pruned").checked;
  const shown = current.nodes.filter(node => node.round <= last).map(node => after(node, last));
  view.update(shown.filter(node => all || node.state !== "pruned"));
  const best = bestLeaf(shown);
  if (best) view.mark(best.id);
}

at("choice").addEventListener("submit", event => event.preventDefault());
at("find").addEventListener("input", list);
at("search").addEventListener("change", open);
at("round").addEventListener("input", draw);
at("pruned").addEventListener("change", draw);
list();
