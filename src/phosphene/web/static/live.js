// Live use: a filter rendered while one looks on, any filter of any layer, and a visitor's photo. Only a server sends
// this; nothing that is shown here is kept there.

const SVG = "http://www.w3.org/2000/svg";
const MOST = 20e6; // bytes of a photo
const PATIENCE = 8; // times that a busy server is asked again

const made = (name, facts = {}, ...inside) => {
  const one = document.createElement(name);
  Object.assign(one, facts);
  one.append(...inside);
  return one;
};

const drawn = (name, facts) => {
  const one = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(facts)) one.setAttribute(key, value);
  return one;
};

const sentence = (text) => text && text[0].toUpperCase() + text.slice(1).replace(/\.?$/, ".");
const short = (number) => (number === null ? "not a number" : String(Number(number.toPrecision(4))));

async function answered(asking, again = () => asking()) {
  for (let tries = 0; ; tries++) {
    const answer = await (tries ? again() : asking());
    if (answer.ok) return answer;
    if (answer.status === 429 && tries < PATIENCE) {
      await new Promise((done) => setTimeout(done, 1500));
      continue;
    }
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error ?? `the server answered ${answer.status}`);
  }
}

const told = (error) => sentence(error instanceof TypeError ? "the server cannot be reached" : error.message);

// ---- a filter, rendered while one looks on

async function* events(answer) {
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const name = /^event: (.*)$/m.exec(part);
      const data = /^data: (.*)$/m.exec(part);
      if (name && data) yield [name[1], JSON.parse(data[1])];
    }
  }
}

function curve(points, steps) {
  const scores = points.map(([, score]) => score);
  const low = Math.min(...scores);
  const span = Math.max(...scores) - low || 1;
  return points.map(([step, score]) => `${(200 * step) / steps},${80 - (80 * (score - low)) / span}`).join(" ");
}

function easel(root) {
  const find = (selector) => root.querySelector(selector);
  const form = find("form");
  const { recipe, size, steps, seed, stop } = form.elements;
  const [said, view, outcome] = [".said", ".easel", ".outcome"].map(find);
  const [image, progress, count, line] = [".easel img", "progress", ".count", "polyline"].map(find);
  const name = `filter ${root.dataset.channel} of ${root.dataset.layer}`;
  let under = null;

  const fill = (known) => {
    size.value = known.size;
    steps.value = known.steps;
    seed.value = known.seed;
  };

  const say = (text) => {
    if (said.textContent !== text) said.textContent = text;
  };

  const show = {
    waiting({ place }) {
      say(place ? `Waiting: ${place} ${place === 1 ? "is" : "are"} before you.` : "It is your turn; the network is being made ready.");
    },
    frame({ step, steps: all, score, image: picture }, points) {
      view.hidden = false;
      image.src = picture;
      image.alt = `${name}, as it comes into being`;
      progress.max = all;
      progress.value = step;
      count.textContent = `Step ${step} of ${all}, score ${short(score)}`;
      if (points.length && step < points.at(-1)[0]) points.length = 0; // a filter that stayed silent is tried once more
      if (score !== null) points.push([step, score]);
      line.setAttribute("points", curve(points, all));
      const quarters = Math.floor((4 * step) / all);
      say(["Rendering.", "A quarter is done.", "Half is done.", "Three quarters are done.", "Nearly there."][quarters]);
    },
    done({ score, start_score: start, dead, image: picture, command }) {
      image.src = picture;
      image.alt = `the picture that ${name} answers to`;
      say(`Done: score ${short(score)}, from ${short(start)} at the start.${dead ? " The filter stayed silent: it answers to nothing that was tried." : ""}`);
      outcome.hidden = false;
      for (const one of outcome.querySelectorAll(".made")) one.hidden = !command;
      outcome.querySelector("code").textContent = command;
    },
    failed({ error }) {
      say(sentence(error));
    },
  };

  async function render() {
    under?.abort();
    const mine = (under = new AbortController());
    const wish = { layer: root.dataset.layer, channel: Number(root.dataset.channel), recipe: recipe.value };
    for (const one of [size, steps, seed]) if (one.value !== "") wish[one.name] = Number(one.value);
    const asked = { method: "POST", body: JSON.stringify(wish), headers: { "Content-Type": "application/json" }, signal: mine.signal };
    outcome.hidden = true;
    stop.hidden = false;
    say("Asked for.");
    let last = "";
    try {
      const points = [];
      for await (const [event, facts] of events(await answered(() => fetch(root.dataset.url, asked)))) {
        show[(last = event)]?.(facts, points);
      }
      if (last !== "done" && last !== "failed") throw new TypeError("it broke off");
    } catch (error) {
      say(mine.signal.aborted ? "Stopped." : told(error));
    }
    if (under === mine) stop.hidden = true;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    render();
  });
  stop.addEventListener("click", () => {
    under?.abort();
    form.querySelector("button").focus();
  });
  addEventListener("pagehide", () => under?.abort());

  fetch(root.dataset.recipes)
    .then((answer) => (answer.ok ? answer.json() : Promise.reject(new Error())))
    .then(({ own, recipes }) => {
      recipe.replaceChildren(...Object.keys(recipes).map((one) => made("option", { textContent: one, selected: one === own })));
      fill(recipes[own]);
      recipe.addEventListener("change", () => fill(recipes[recipe.value]));
    })
    .catch(() => {}); // then there is the atlas' own alone
}

// ---- any filter of any layer

const slug = (path) =>
  [...new TextEncoder().encode(path)]
    .map((byte) => [String.fromCharCode(byte), `~${byte.toString(16).toUpperCase().padStart(2, "0")}`])
    .map(([plain, coded]) => (/[A-Za-z0-9._-]/.test(plain) ? plain : coded))
    .join("")
    .replace(/^\./, "~2E");

function anything(form) {
  const { layer, channel } = form.elements;
  const state = form.querySelector("[role=status]");
  const list = form.querySelector("datalist");
  let layers = new Map();

  const load = async () => {
    state.textContent = "The network is being loaded.";
    try {
      const answer = await answered(() => fetch(form.dataset.layers));
      layers = new Map((await answer.json()).layers.map((one) => [one.path, one]));
      list.replaceChildren(...[...layers.values()].map((one) => made("option", { value: one.path, label: `${one.channels} filters` })));
      state.textContent = `${layers.size} layers have maps.`;
    } catch (error) {
      state.textContent = told(error);
      layer.addEventListener("focus", load, { once: true });
    }
  };

  layer.addEventListener("focus", load, { once: true });
  layer.addEventListener("input", () => {
    const known = layers.get(layer.value);
    channel.max = known ? known.channels - 1 : "";
    if (known) state.textContent = `${known.kind}, ${known.channels} filters: 0 to ${known.channels - 1}.`;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (layers.size && !layers.has(layer.value)) state.textContent = "There is no such layer; choose one of the list.";
    else location.href = `${slug(layer.value)}/${Number(channel.value)}.html`;
  });
}

// ---- a visitor's photo

function visitor(root) {
  const part = (id) => document.getElementById(id);
  const [drop, file, state, seen] = ["drop", "file", "state", "seen"].map(part);
  const [how, classes, other, method, layer] = ["how", "classes", "other", "method", "layer"].map(part);
  const [group, channels] = ["group", "channels"].map(part);
  const under = new Map();
  let photo = null;
  let excited = null;
  let top = "";

  // what was asked for before of the same kind is of no interest any more
  const ask = async (kind, asked = {}) => {
    under.get(kind)?.abort();
    const mine = new AbortController();
    under.set(kind, mine);
    const query = new URLSearchParams(Object.entries(asked).filter(([, value]) => value));
    const send = () => fetch(`${kind}?${query}`, { method: "POST", body: photo, signal: mine.signal });
    return answered(send);
  };

  const trying = async (work, doing = "Looking …") => {
    state.textContent = doing;
    root.setAttribute("aria-busy", "true");
    try {
      await work();
      state.textContent = "";
    } catch (error) {
      if (error.name === "AbortError") return;
      state.textContent = told(error);
    }
    root.removeAttribute("aria-busy");
  };

  const bar = (share) => {
    const one = drawn("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
    one.append(drawn("rect", { class: "whole", width: 100, height: 6 }), drawn("rect", { width: 100 * share, height: 6 }));
    return one;
  };

  const choice = (one) =>
    made("label", {}, made("input", { type: "radio", name: "target", value: one.index }), made("span", { textContent: one.name }),
      made("b", { textContent: `${(100 * one.probability).toFixed(1)} %` }), bar(one.probability));

  const listed = (found, chosen) => {
    const now = JSON.stringify(found);
    if (now !== top) {
      classes.replaceChildren(classes.querySelector("legend"), ...found.map(choice));
      top = now;
    }
    for (const one of classes.querySelectorAll("input")) one.checked = Number(one.value) === chosen;
  };

  const target = () => other.value.trim() || (classes.querySelector("input:checked")?.value ?? "");

  async function heat() {
    const asked = { method: method.value, layer: layer.disabled ? "" : layer.value, target: target() };
    const found = await (await ask("photo", asked)).json();
    const named = found.classes.length > 0;
    how.hidden = part("bar").hidden = !named;
    part("heat").src = found.picture;
    part("heat").alt = named ? `your photo, with a heat map of ${found.caption}` : "your photo";
    part("caption").textContent = named ? found.note ? sentence(found.note) : found.caption : "";
    part("unnamed").hidden = named;
    part("unnamed").textContent = named ? "" : found.note;
    if (!named) return;
    listed(found.classes, found.target.index);
    part("strongest").textContent = short(found.strongest);
    part("bar").hidden = found.note !== "";
    part("caution").hidden = !found.caution;
    part("caution").textContent = found.caution && `${found.method}: ${found.caution}.`;
    layer.disabled = found.layer === "input";
  }

  const portrait = (one) =>
    made("li", {}, made("a", { href: one.page },
      made("img", { src: one.picture, alt: `filter ${one.channel} of ${one.layer}`, loading: "lazy" }),
      made("b", { textContent: `${one.excitation.toFixed(2)}` }),
      made("span", { textContent: `${one.layer} ${one.channel}` }),
      made("i", { textContent: one.verdict, className: one.verdict })));

  const gallery = () => {
    const found = group.value ? excited.layers.find((one) => one.path === group.value).filters : excited.strongest;
    part("filters").replaceChildren(...found.map(portrait));
  };

  async function filters() {
    excited = await (await ask("excited")).json();
    const before = group.value;
    group.replaceChildren(made("option", { value: "", textContent: "all layers" }),
      ...excited.layers.map((one) => made("option", { textContent: one.path, selected: one.path === before })));
    const measure = excited.photos
      ? `1 is as strongly as the strongest of the ${excited.photos.toLocaleString("en")} photos that this atlas was made with, 0 is their mean.`
      : "1 is as strongly as the filter's own picture, 0 as little as plain grey.";
    part("basis").textContent = `${measure} For this the network sees your photo at ${excited.size.join("×")} px, as it saw those.`;
    gallery();
  }

  async function sheet() {
    const content = await (await ask("activations", { layer: channels.value })).blob();
    const image = part("sheet");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(content);
    image.alt = `what each channel of ${channels.value} answers to your photo`;
  }

  function show(content) {
    if (!content) return;
    if (content.size > MOST) {
      state.textContent = "This file is larger than 20 MB; give a smaller one.";
      return;
    }
    photo = content;
    other.value = "";
    for (const one of classes.querySelectorAll("input")) one.checked = false;
    trying(async () => {
      await heat();
      seen.hidden = false;
      await Promise.all([filters(), sheet()]);
    });
  }

  let asked = false;
  const fill = async () => {
    if (asked) return;
    asked = true;
    const answer = await fetch("layers.json");
    if (!answer.ok) return;
    const found = await answer.json();
    part("names").replaceChildren(...found.classes.map((one) => made("option", { value: one })));
    for (const select of root.querySelectorAll("select[data-fill]")) {
      const options = found.layers.map((one) => made("option", { textContent: one.path }));
      select.append(made("optgroup", { label: "all layers with a map" }, ...options));
    }
  };

  file.addEventListener("change", () => {
    show(file.files[0]);
    file.value = ""; // so that the same file can be chosen again
  });
  part("cat").addEventListener("click", () => {
    trying(async () => show(await (await answered(() => fetch(root.dataset.example))).blob()));
  });
  for (const [kind, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", over);
    });
  }
  addEventListener("drop", (event) => show(event.dataTransfer.files[0]));
  addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (pasted) event.preventDefault();
    show(pasted);
  });
  how.addEventListener("submit", (event) => event.preventDefault());
  how.addEventListener("change", (event) => {
    if (event.target.type === "radio") other.value = "";
    trying(heat);
  });
  group.addEventListener("change", gallery);
  channels.addEventListener("change", () => trying(sheet));
  for (const one of [other, layer, channels]) one.addEventListener("focus", fill);
}

for (const [id, begin] of [["render", easel], ["any", anything], ["visitor", visitor]]) {
  const root = document.getElementById(id);
  if (root) begin(root);
}
