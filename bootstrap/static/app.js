// Draws the status document and redraws it with every server-sent event.
//
// Names and ids come from strangers, so text enters the page through textContent and nothing else.
// Elements are kept and only their text is changed, so that a selection or the scroll position survives an update.

import { LossChart } from "/static/chart.js";
import { bytes, count, loss, seconds, shortId } from "/static/format.js";

const RETRY_MS = 5000;
const ALGORITHMS = { "noloco": "NoLoCo", "diloco": "DiLoCo", "pair-average": "pair averaging", "local": "no exchange" };
const DATA = { stdlib: "Python's standard library", files: "the organiser's text", local: "the volunteers' own text" };
const OUTCOMES = {
  averaged: "averaged", clipped: "averaged, clipped", refused: "refused",
  alone: "stepped alone", timeout: "deadline passed", lost: "partner lost",
};

const byId = (id) => document.getElementById(id);
const chart = new LossChart(byId("chart"));
const rows = new Map();

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function drawHeader(run) {
  setText(byId("run-name"), run.name);
  const parts = [
    `A language model of ${count(run.parameters)} parameters`,
    `trained on ${DATA[run.data] ?? run.data}`,
    `${ALGORITHMS[run.algorithm] ?? run.algorithm}, ${count(run.inner_steps)} steps per round`,
  ];
  setText(byId("run-about"), parts.join(" · "));
  setText(byId("run-id"), `run ${run.id.slice(0, 16)}…`);
  byId("run-id").title = `run ${run.id}, published by ${run.organiser}`;
}

function drawTiles(status) {
  const { run, swarm, peers } = status;
  const curve = status.val_loss;
  setText(byId("val-loss"), loss(swarm.val_loss));
  setText(byId("val-loss-note"), swarm.val_loss === null ? "not measured yet" : lossNote(swarm, curve));
  setText(byId("speed"), `${count(Math.round(swarm.tokens_per_s))} tok/s`);
  setText(byId("speed-note"), `${count(swarm.tokens)} tokens so far`);
  setText(byId("num-peers"), count(swarm.peers));
  const serving = peers.filter((peer) => peer.state === "serving").length;
  setText(byId("num-peers-note"), `${count(swarm.training)} training` + (serving ? ` · ${serving} serving` : ""));
  setText(byId("round"), run.total_rounds ? `${count(swarm.round)} / ${count(run.total_rounds)}` : count(swarm.round));
  setText(byId("round-note"), roundNote(swarm, peers));
  document.title = swarm.val_loss === null ? run.name : `${loss(swarm.val_loss)} · ${run.name}`;
}

function lossNote(swarm, curve) {
  const start = curve[0][1];
  const where = `round ${count(swarm.val_round)}`;
  if (curve.length < 2 || start === 0) return where;
  const fall = (100 * (start - swarm.val_loss)) / start;
  return `${where} · ${Math.abs(fall).toFixed(0)} % ${fall >= 0 ? "below" : "above"} the start`;
}

function roundNote(swarm, peers) {
  const waits = peers.filter((p) => p.state === "training" && p.round === swarm.round && p.eta_s !== null).map((p) => p.eta_s);
  if (waits.length) return `about ${seconds(waits.sort((a, b) => a - b)[Math.floor(waits.length / 2)])} left in it`;
  return swarm.training ? "" : "nobody is training";
}

function drawWarnings(warnings) {
  const box = byId("warnings");
  const list = box.querySelector("ul");
  box.hidden = warnings.length === 0;
  if (warnings.join("\n") !== [...list.children].map((item) => item.textContent).join("\n")) {
    list.replaceChildren(...warnings.map((text) => make("li", "", text)));
  }
}

// Bars of equal scale, so that the stage that holds the others up is the shortest.
function stageItem(stage, fastest) {
  const item = document.createElement("li");
  const bar = make("progress");
  bar.max = Math.max(fastest, 1e-9);
  bar.value = stage.microbatches_per_s;
  const peers = stage.peers ? `${count(stage.peers)} ${stage.peers === 1 ? "peer" : "peers"}` : "nobody";
  const held = make("span", "pill", peers);
  held.dataset.state = stage.peers ? "held" : "lost";
  item.append(make("span", "quiet", `stage ${stage.stage}`), bar, held);
  return item;
}

let drawnStages = "";

function drawStages(stages) {
  const box = byId("stages");
  box.hidden = stages.length === 0;
  const drawn = JSON.stringify(stages);
  if (box.hidden || drawn === drawnStages) return;
  drawnStages = drawn;
  const fastest = Math.max(...stages.map((stage) => stage.microbatches_per_s));
  box.querySelector("ol").replaceChildren(...stages.map((stage) => stageItem(stage, fastest)));
  setText(byId("stages-note"), "microbatches per second that the peers of a stage can take together");
}

const COLUMNS = ["Peer", "State", "Round", "Step", "Tokens/s", "Train loss", "Val. loss", "Sent", "Received"];

function makeRow() {
  const row = document.createElement("tr");
  row.append(...COLUMNS.map((label, i) => {
    const cell = make("td", i > 1 ? "number" : "");
    cell.dataset.label = label;
    return cell;
  }));
  row.cells[0].append(make("span", "name"), make("span", "id quiet small"));
  row.cells[1].append(make("span", "pill"));
  row.cells[3].append(make("span"), make("progress"));
  return row;
}

function fillRow(row, peer) {
  const trains = peer.role === "trainer";
  const [name, id] = row.cells[0].children;
  setText(name, peer.name.trim() || (trains ? "unnamed" : "bootstrap"));
  setText(id, shortId(peer.peer) + (peer.stage === null ? "" : ` · stage ${peer.stage}`));
  id.title = peer.version ? `${peer.peer}, version ${peer.version}` : peer.peer;
  const pill = row.cells[1].firstElementChild;
  pill.dataset.state = peer.state;
  setText(pill, peer.state === "silent" ? `silent ${seconds(peer.age_s)}` : peer.state);
  const [step, bar] = row.cells[3].children;
  setText(step, trains ? `${count(peer.step)}/${count(peer.inner_steps)}` : "–");
  bar.hidden = !trains || peer.inner_steps === 0;
  bar.max = Math.max(peer.inner_steps, 1);
  bar.value = peer.step;
  const shown = [
    [2, trains ? count(peer.round) : "–"],
    [4, trains ? count(Math.round(peer.tokens_per_s)) : "–"],
    [5, loss(peer.train_loss)],
    [6, loss(peer.val_loss)],
    [7, bytes(peer.sent_bytes)],
    [8, bytes(peer.received_bytes)],
  ];
  for (const [i, text] of shown) setText(row.cells[i], text);
  row.classList.toggle("away", peer.state === "silent" || peer.state === "leaving");
}

function drawPeers(peers, swarm) {
  const body = byId("peers").tBodies[0];
  byId("peers").hidden = peers.length === 0;
  byId("peers-empty").hidden = peers.length !== 0;
  const total = `${bytes(swarm.sent_bytes)} sent, ${bytes(swarm.received_bytes)} received in all`;
  setText(byId("peers-note"), peers.length ? total : "");
  const present = new Set(peers.map((peer) => peer.peer));
  for (const [peer, row] of rows) {
    if (!present.has(peer)) {
      row.remove();
      rows.delete(peer);
    }
  }
  peers.forEach((peer, i) => {
    if (!rows.has(peer.peer)) rows.set(peer.peer, makeRow());
    const row = rows.get(peer.peer);
    fillRow(row, peer);
    if (body.rows[i] !== row) body.insertBefore(row, body.rows[i] ?? null);
  });
}

function exchangeItem(exchange) {
  const item = document.createElement("li");
  const pair = make("span", "pair");
  pair.append(make("span", "name", exchange.name));
  if (exchange.partner !== null) pair.append(make("span", "quiet", " with "), make("span", "name", exchange.partner_name));
  const outcome = make("span", "pill", OUTCOMES[exchange.outcome] ?? exchange.outcome);
  outcome.dataset.state = exchange.outcome;
  item.append(
    make("span", "quiet when", `round ${count(exchange.round)}`), pair, outcome,
    make("span", "quiet number took", exchange.partner === null ? "" : seconds(exchange.seconds)),
  );
  return item;
}

let drawnExchanges = "";

function whyNoExchange(run, swarm) {
  if (run.algorithm === "local") return "Peers of this run train without exchanging anything.";
  if (swarm.training === 1) return "One peer trains alone. Exchanges begin when a second one joins.";
  return "None yet. Peers average at the end of every round.";
}

function drawExchanges({ run, swarm, exchanges }) {
  const newest = exchanges.slice(0, 12);
  const drawn = JSON.stringify(newest);
  if (drawn !== drawnExchanges) {
    byId("exchanges").replaceChildren(...newest.map(exchangeItem));
    drawnExchanges = drawn;
  }
  setText(byId("exchanges-note"), `${count(swarm.exchanges_ok)} averaged, ${count(swarm.exchanges_failed)} not`);
  byId("exchanges-empty").hidden = newest.length !== 0;
  setText(byId("exchanges-empty"), whyNoExchange(run, swarm));
}

function draw(status) {
  drawHeader(status.run);
  drawWarnings(status.warnings);
  drawTiles(status);
  byId("chart-empty").hidden = status.val_loss.length !== 0;
  chart.show(status.val_loss);
  drawStages(status.stages);
  drawPeers(status.peers, status.swarm);
  drawExchanges(status);
}

function showLink(state, text) {
  byId("link").dataset.state = state;
  setText(byId("link"), text);
}

function listen() {
  const events = new EventSource("/api/v1/events");
  events.onmessage = (event) => {
    draw(JSON.parse(event.data));
    showLink("live", "live");
  };
  events.onerror = () => {
    showLink("lost", "not connected, retrying");
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, RETRY_MS);
  };
}

listen();
