"use strict";
// Draws one answer at a time: its words, and a row of cells per word under the thumbnails of the clip.
const data = JSON.parse(document.getElementById("data").textContent);
const F = data.frames.length;
const state = { response: 0, scale: "answer", pinned: null };
const find = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// null stands for what is no number: such a cell stays empty, such a weight counts as 1.
const isNumber = (value) => value !== null;
const weightOf = (t) => data.responses[state.response].weights[t] ?? 1;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const share = (row) => { const total = sum(row); return row.map((value) => (total > 0 ? value / total : 0)); };
const range = (values) => values.filter(isNumber).reduce(
  ([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
const percent = (value) => `${Math.round(100 * value)}%`;
const tint = (weight) => `rgba(245,158,11,${data.top > 1 ? (0.85 * (weight - 1)) / (data.top - 1) : 0})`;

// A power below 1 keeps weak attention visible beside strong.
const blue = (value) => {
  const strength = Math.max(0, Math.min(1, value)) ** 0.7;
  return strength < 0.01 ? "" : `rgba(35,80,200,${strength.toFixed(3)})`;
};

function drawStrip() {
  const strip = find("strip");
  strip.style.setProperty("--frames", F);
  strip.append(element("div", "side", "attention of the word you point at; of the whole answer otherwise"));
  data.frames.forEach((frame) => {
    const cell = element("div", frame.picked ? "frame pick" : "frame");
    const image = element("img");
    image.src = frame.image;
    image.alt = `frame at ${frame.time}${frame.picked ? ", picked" : ""}${frame.labelled ? ", decides the question" : ""}`;
    const look = element("div", "look");
    look.append(element("i"));
    cell.append(element("span", "mark", frame.picked ? "picked" : ""), image);
    if (data.truthKnown) cell.append(element("span", frame.labelled ? "truth yes" : "truth"));
    cell.append(element("span", "", frame.time.split("-")[0].replace(" s", "") + " s"), look);
    strip.append(cell);
  });
  strip.append(element("div", "side", "weight in training"));
}

function drawResponse() {
  const { tokens, weights, mass } = data.responses[state.response];
  const speech = find("speech"), rows = find("rows");
  const joined = tokens.some((token) => /^\s/.test(token));
  const all = mass.flat();
  speech.replaceChildren();
  rows.replaceChildren();
  rows.style.setProperty("--frames", F);
  tokens.forEach((token, t) => {
    const word = element("span", "token", token);
    word.style.background = tint(weightOf(t));
    word.dataset.token = t;
    speech.append(word);
    if (!joined) speech.append(" ");

    const row = element("div", "row");
    row.dataset.token = t;
    const label = element("div", "word", token);
    label.style.background = tint(weightOf(t));
    row.append(label);
    const [low, high] = range(state.scale === "word" ? mass[t] : all);
    mass[t].forEach((value) => {
      const cell = element("div", "cell");
      cell.style.background = isNumber(value) && high > low ? blue((value - low) / (high - low)) : "";
      cell.title = value ?? "not a number";
      row.append(cell);
    });
    const weight = element("div", "weight", isNumber(weights[t]) ? weights[t].toFixed(2) : "not a number");
    const bar = element("i");
    bar.style.width = `${data.top > 1 ? (42 * (weightOf(t) - 1)) / (data.top - 1) : 0}px`;
    weight.append(bar);
    row.append(weight);
    rows.append(row);
  });
  const [low, high] = range(all);
  find("range").textContent = state.scale === "word"
    ? "each word from its own lightest to its own darkest frame"
    : low <= high ? `lightest ${low}, darkest ${high} of attention mass` : "";
  document.querySelectorAll(".tabs button").forEach((button) => {
    button.setAttribute("aria-selected", Number(button.dataset.response) === state.response);
  });
  document.querySelectorAll(".switch button").forEach((button) => {
    button.setAttribute("aria-pressed", button.dataset.scale === state.scale);
  });
  point(null);
}

// Light up the frames that one word looks at; with null, those that the whole answer looks at.
function point(t) {
  const { tokens, mass } = data.responses[state.response];
  document.querySelectorAll(".on").forEach((node) => node.classList.remove("on"));
  if (t === null) t = state.pinned;
  const shares = t === null
    ? share(data.frames.map((_, f) => sum(mass.map((row) => share(row)[f]))))
    : share(mass[t]);
  const most = Math.max(...shares, 1e-9);
  document.querySelectorAll(".look i").forEach((bar, f) => {
    bar.style.height = `${(100 * shares[f]) / most}%`;
    bar.parentElement.title = percent(shares[f]);
  });
  const f = shares.indexOf(Math.max(...shares));
  const where = `${data.frames[f].time} (${percent(shares[f])} of what it gives to the clip)`;
  if (t === null) {
    find("readout").textContent = `The answer as a whole looks most at ${where}. Point at a word, or click to hold it.`;
    return;
  }
  document.querySelectorAll(`[data-token="${t}"]`).forEach((node) => node.classList.add("on"));
  if (t === state.pinned) reveal(find("rows").children[t]);
  const weighs = weightOf(t) > 1.005 ? `counts ${weightOf(t).toFixed(2)} times` : "counts once";
  find("readout").textContent = `“${tokens[t].trim()}” looks most at ${where}; it ${weighs} in training.`;
}

// Scroll the map, not the page, until a row stands below the thumbnails.
function reveal(row) {
  const map = find("strip").parentElement, top = row.offsetTop - map.offsetTop;
  const hidden = find("strip").offsetHeight;
  if (top - hidden < map.scrollTop || top + row.offsetHeight > map.scrollTop + map.clientHeight) {
    map.scrollTop = top - (hidden + map.clientHeight) / 2;
  }
}

function tokenOf(event) {
  const node = event.target.closest("[data-token]");
  return node ? Number(node.dataset.token) : null;
}

for (const area of [find("speech"), find("rows")]) {
  area.addEventListener("mouseover", (event) => point(tokenOf(event)));
  area.addEventListener("mouseleave", () => point(null));
  area.addEventListener("click", (event) => {
    const t = tokenOf(event);
    state.pinned = t === state.pinned ? null : t;
    point(null);
  });
}
find("speech").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const last = data.responses[state.response].tokens.length - 1;
  state.pinned = Math.max(0, Math.min(last, (state.pinned ?? (step > 0 ? -1 : last + 1)) + step));
  point(null);
  event.preventDefault();
});
document.querySelectorAll(".tabs button").forEach((button) => button.addEventListener("click", () => {
  Object.assign(state, { response: Number(button.dataset.response), pinned: null });
  drawResponse();
}));
document.querySelectorAll(".switch button").forEach((button) => button.addEventListener("click", () => {
  state.scale = button.dataset.scale;
  drawResponse();
}));

drawStrip();
drawResponse();
// A link such as inspection.html#answer=2&word=5 opens the page there.
const wanted = new URLSearchParams(location.hash.slice(1));
if (wanted.has("answer")) {
  state.response = Math.max(0, Math.min(data.responses.length - 1, Number(wanted.get("answer")) - 1 || 0));
  drawResponse();
}
if (wanted.has("word")) {
  state.pinned = Math.max(0, Math.min(data.responses[state.response].tokens.length - 1, Number(wanted.get("word")) - 1 || 0));
  point(null);
}
