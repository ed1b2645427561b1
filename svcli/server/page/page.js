// The page of `svcli serve`. What a server or a person says becomes text, never HTML.
"use strict";

const DENSE = ":dense";
const find = (id) => document.getElementById(id);

let key = "";
let picture = null; // {url}: a data: URL
let seen = null; // what the model that is chosen kept of it
let asking = null; // an AbortController, while something is asked
const looks = new Map(); // of the picture, by model
let turns = []; // {question, answers}: what was said, by model; the picture goes with the first

// The server

async function call(path, body, signal) {
  const headers = new Headers();
  if (key) headers.set("Authorization", `Bearer ${key}`);
  if (body) headers.set("Content-Type", "application/json");
  const options = { method: body ? "POST" : "GET", headers, signal, credentials: "omit", redirect: "error" };
  if (body) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) needKey();
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The server answered with status ${response.status}.`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice("data: ".length);
  }
}

// A look at the same picture is shared, and made anew where it failed.
function look(model, signal) {
  if (!looks.has(model)) {
    const body = { model, image_url: { url: picture.url } };
    const found = call("v1/svcli/look", body, signal).then((response) => response.json());
    looks.set(model, found);
    found.catch(() => looks.get(model) === found && looks.delete(model));
  }
  return looks.get(model);
}

async function listModels() {
  tell("");
  try {
    const { data } = await (await call("v1/models")).json();
    find("model").replaceChildren(...data.map(({ id }) => new Option(id)));
    find("model-line").hidden = data.length < 2;
    find("key-form").hidden = true;
    choose();
  } catch (error) {
    tell(error.message);
  }
}

function needKey() {
  find("key-form").hidden = false;
  find("key").focus();
}

// What is shown

function tell(problem) {
  find("problem").textContent = problem;
  find("problem").hidden = !problem;
}

function dense() {
  const names = [...find("model").options].map((option) => option.value);
  return names.find((name) => name === find("model").value + DENSE);
}

// Another model, or another picture.
async function choose() {
  find("compare-line").hidden = !dense();
  seen = null;
  draw();
  const model = find("model").value;
  if (!picture || !model) return;
  const { url } = picture;
  const current = () => picture.url === url && find("model").value === model;
  find("picture-note").textContent = "Looking at the picture …";
  try {
    const found = await look(model);
    if (!current()) return;
    seen = found;
    find("picture-note").textContent = described(found);
  } catch (error) {
    if (!current()) return;
    find("picture-note").textContent = "";
    tell(error.message);
  }
  draw();
}

function described({ visual_tokens: all, visual_tokens_kept: kept, boxes }) {
  const counts = `${kept} of ${all} visual tokens are kept.`;
  if (!boxes) return `${counts} No patches are marked: the model selects none, or its engine does not tell.`;
  return `${counts} Clear and outlined: the ${boxes.length} patches that were retained. Dimmed: the rest.`;
}

function draw() {
  const boxes = seen?.boxes, canvas = find("overlay");
  find("mark-line").hidden = !boxes;
  canvas.hidden = !boxes || !find("mark").checked;
  if (canvas.hidden) return;
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(find("picture").clientWidth * scale);
  canvas.height = Math.round(find("picture").clientHeight * scale);
  const brush = canvas.getContext("2d");
  const places = boxes.map(([left, top, right, bottom]) => {
    const x = Math.round(left * canvas.width), y = Math.round(top * canvas.height);
    return [x, y, Math.round(right * canvas.width) - x, Math.round(bottom * canvas.height) - y];
  });
  brush.fillStyle = "rgba(24, 24, 28, 0.68)";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  // Rims, one on the other; what is retained is cut out of them, so that one runs around each group of patches.
  for (const [width, colour] of [[3 * scale, "#000"], [1.5 * scale, "#ffb000"]]) {
    brush.fillStyle = colour;
    for (const [x, y, wide, high] of places) brush.fillRect(x - width, y - width, wide + 2 * width, high + 2 * width);
  }
  for (const place of places) brush.clearRect(...place);
}

async function show(file) {
  tell("");
  if (!file.type.startsWith("image/")) {
    tell(`${file.name || "What was pasted"} is not a picture.`);
    return;
  }
  const reader = new FileReader();
  await new Promise((resolve) => {
    reader.onloadend = resolve;
    reader.readAsDataURL(file);
  });
  if (reader.error) {
    tell(`${file.name} cannot be read.`);
    return;
  }
  begin();
  picture = { url: reader.result };
  looks.clear();
  find("picture").src = picture.url;
  find("picture").alt = `The picture: ${file.name}`;
  find("frame").hidden = false;
  find("choose").textContent = "Choose, drop or paste another picture";
  document.querySelector(".drop").classList.add("full");
  choose();
}

// Asking

// Another conversation.
function begin() {
  asking?.abort();
  turns = [];
  find("answers").replaceChildren();
  find("new").disabled = true;
  tell("");
}

function turn(question) {
  const copy = find("turn").content.cloneNode(true);
  copy.querySelector("h3").textContent = question;
  const cards = copy.querySelector(".cards"), difference = copy.querySelector(".difference");
  find("answers").append(copy);
  return { cards, difference };
}

function card(model, cards) {
  const copy = find("answer").content.cloneNode(true);
  copy.querySelector("h4").textContent = model;
  const text = copy.querySelector(".text");
  text.setAttribute("aria-busy", "true");
  const facts = {};
  for (const fact of copy.querySelectorAll("[data-fact]")) facts[fact.dataset.fact] = fact;
  cards.append(copy);
  return { text, facts };
}

// What was said, and the question, for a model: with its own answers, or those of another where it was not asked.
function conversation(model, question) {
  const messages = [];
  for (const { question: asked, answers } of turns) {
    const [other] = answers.values();
    messages.push({ role: "user", content: asked }, { role: "assistant", content: answers.get(model) ?? other });
  }
  messages.push({ role: "user", content: question });
  if (picture) {
    const text = { type: "text", text: messages[0].content };
    messages[0].content = [{ type: "image_url", image_url: { url: picture.url } }, text];
  }
  return messages;
}

async function answer(model, messages, { text, facts }, signal) {
  if (picture) await look(model, signal);
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  const started = performance.now();
  let first = null, last = null, ended = false, usage = null, finish = null;
  for await (const data of events(await call("v1/chat/completions", body, signal))) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    finish = chunk.choices[0]?.finish_reason ?? finish;
    const words = chunk.choices[0]?.delta.content;
    if (!words) continue;
    text.append(words);
    last = performance.now();
    if (first === null) {
      first = last;
      facts.first.textContent = `${Math.round(first - started)} ms`;
    }
  }
  if (!ended || !usage) throw new Error("The answer broke off.");
  const { visual_tokens: all, visual_tokens_kept: kept, cached_tokens: cached } = usage.prompt_tokens_details;
  facts.visual.textContent = `${kept} of ${all}`;
  facts.rows.textContent = usage.prompt_tokens;
  facts.cached.textContent = cached;
  facts.answer.textContent = `${usage.completion_tokens} tokens${finish === "length" ? ", cut off" : ""}`;
  // Pieces that come together say nothing about a rate.
  if (last - first > 20) facts.rate.textContent = ((1000 * (usage.completion_tokens - 1)) / (last - first)).toFixed(1);
}

function parting([one, other]) {
  if (one === other) return "Both say the same, word for word.";
  const words = one.split(/\s+/), others = other.split(/\s+/);
  const place = words.findIndex((word, index) => word !== others[index]);
  const same = words.slice(0, place < 0 ? words.length : place);
  return same.length ? `They part behind “${same.slice(-4).join(" ")}”.` : "They part from the first word on.";
}

async function ask() {
  const question = find("question").value.trim(), model = find("model").value;
  if (asking || !question || !model) return;
  const controller = (asking = new AbortController());
  const twin = find("compare").checked && dense();
  const models = twin ? [model, twin] : [model];
  tell("");
  const { cards: place, difference } = turn(question), before = turns, answers = new Map();
  const cards = models.map((name) => card(name, place));
  find("question").value = "";
  find("measured").hidden = false;
  find("ask").disabled = true;
  find("stop").disabled = find("new").disabled = false;
  if (picture && !seen) choose(); // a look that failed is tried again
  let all = true;
  for (const [index, name] of models.entries()) {
    const { text, facts } = cards[index];
    try {
      if (all) await answer(name, conversation(name, question), cards[index], controller.signal);
    } catch (error) {
      all = false;
      if (controller.signal.aborted) facts.answer.textContent = "stopped";
      else tell(error.message);
    }
    text.setAttribute("aria-busy", "false");
    // What was said before it was stopped stands.
    if (text.textContent) answers.set(name, text.textContent);
  }
  if (all && twin) difference.textContent = parting(cards.map(({ text }) => text.textContent));
  if (turns === before && answers.size) turns.push({ question, answers });
  else if (turns === before) find("question").value ||= question;
  if (document.activeElement === find("question")) find("ask-form").scrollIntoView({ block: "nearest" });
  find("stop").disabled = true;
  find("ask").disabled = false;
  asking = null;
}

// The keyboard, the mouse, the clipboard

find("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
find("new").addEventListener("click", () => {
  begin();
  find("question").focus();
});
find("stop").addEventListener("click", () => asking?.abort());
document.addEventListener("keydown", (event) => event.key === "Escape" && asking?.abort());
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!/^[\x20-\x7e]+$/.test(find("key").value)) {
    tell("A key has no letters beyond ASCII.");
    return;
  }
  key = find("key").value;
  find("key").value = "";
  listModels();
});
find("model").addEventListener("change", choose);
find("mark").addEventListener("change", draw);
find("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) show(file);
  event.target.value = ""; // the same file may be chosen again
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.querySelector(".drop").classList.add("over");
});
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, () => document.querySelector(".drop").classList.remove("over"));
}
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) show(file);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (!file) return; // text, for a field
  event.preventDefault();
  show(file);
});
find("picture").addEventListener("load", draw);
find("picture").addEventListener("error", () => tell("This browser cannot show the picture."));
new ResizeObserver(draw).observe(find("picture"));

listModels();
