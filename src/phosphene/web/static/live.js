// Live use: a filter rendered while the visitor watches, any filter of any layer, and a visitor's photo. Only a server
// sends this script, and it stores nothing of what is shown.

const SVG = "http://www.w3.org/2000/svg";
const MOST = 20e6; // bytes of a photo
const PATIENCE = 8; // times that a request to a busy server is repeated

const made = (name, facts = {}, ...inside) => {
  const element = document.createElement(name);
  Object.assign(element, facts);
  element.append(...inside);
  return element;
};

const drawn = (name, facts) => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(facts)) element.setAttribute(key, value);
  return element;
};

const sentence = (text) => text && text.replace(/\.?$/, "."); // names at its beginning stay as they are spelled
const percent = (share) => (share < 0.0005 ? "below 0.1 %" : `${(100 * share).toFixed(1)} %`);
const short = (number) => (number === null ? "not a number" : String(Number(number.toPrecision(4))));

async function answered(asking, again = () => asking()) {
  for (let tries = 0; ; tries++) {
    const answer = await (tries ? again() : asking());
    if (answer.ok) return answer;
    if (answer.status === 429 && tries < PATIENCE) {
      await new Promise((done) => setTimeout(done, 1500));
      continue;
    }
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error ?? `the server answered ${answer.status}`);
  }
}

const errorSentence = (error) => sentence(error instanceof TypeError ? "The server cannot be reached" : error.message);

// Return what recipes.json says once it is known whether the network can be opened here; only then `controls` are shown.
async function openRecipes(root, controls) {
  let recipes = {};
  try {
    recipes = await (await answered(() => fetch(root.dataset.recipes))).json();
  } catch {
    // the next request says what is wrong
  }
  const note = root.closest(".live").querySelector(".refused");
  note.textContent = recipes.refused ?? "";
  note.hidden = !recipes.refused;
  controls.hidden = Boolean(recipes.refused);
  return recipes;
}

// text between backticks is code
const spelled = (text) => text.split("`").map((part, number) => (number % 2 ? made("code", { textContent: part }) : part));

// a long name may break where its parts meet
const breaking = (name) => name.split(/(?<=[._/])/).flatMap((part) => [part, document.createElement("wbr")]);

// ---- a filter, rendered while the visitor watches

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
  const [status, view, outcome] = [".said", ".easel", ".outcome"].map(find);
  const [image, progress, count, line] = [".easel img", "progress", ".count", "polyline"].map(find);
  const name = `filter ${root.dataset.channel} of ${root.dataset.layer}`;
  let under = null;

  const fill = (settings) => {
    size.value = settings.size;
    steps.value = settings.steps;
    seed.value = settings.seed;
  };

  const say = (text) => {
    if (status.textContent !== text) status.textContent = text;
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
    done({ score, start_score: start, dead, plain, image: picture, command }) {
      image.src = picture;
      image.alt = `the picture that ${name} answers to`;
      say(`Done: score ${short(score)}, from ${short(start)} at the start.${dead ? " The filter stayed silent: it answers to nothing that was tried." : plain ? " The filter wants a flat colour: a pattern adds little." : ""}`);
      outcome.hidden = false;
      for (const element of outcome.querySelectorAll(".made")) element.hidden = !command;
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
    for (const input of [size, steps, seed]) if (input.value !== "") wish[input.name] = Number(input.value);
    const request = { method: "POST", body: JSON.stringify(wish), headers: { "Content-Type": "application/json" }, signal: mine.signal };
    outcome.hidden = true;
    stop.hidden = false;
    say("Asked for.");
    let last = "";
    try {
      const points = [];
      for await (const [event, facts] of events(await answered(() => fetch(root.dataset.url, request)))) {
        show[(last = event)]?.(facts, points);
      }
      if (last !== "done" && last !== "failed") throw new TypeError("it broke off");
    } catch (error) {
      say(mine.signal.aborted ? "Stopped." : errorSentence(error));
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

  openRecipes(root, form).then(({ own: atlasRecipe, recipes }) => {
    if (!recipes) return; // then there is the atlas' own alone
    recipe.replaceChildren(...Object.keys(recipes).map((name) => made("option", { textContent: name, selected: name === atlasRecipe })));
    fill(recipes[atlasRecipe]);
    recipe.addEventListener("change", () => fill(recipes[recipe.value]));
  });
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
  const facts = openRecipes(form, form);
  let layers = new Map();
  let flat = [];
  let loading = null;

  const load = () => {
    loading ??= loaded().catch((error) => {
      loading = null; // so that it can be tried again
      state.textContent = errorSentence(error);
    });
    return loading;
  };

  async function loaded() {
    state.textContent = "The network is being loaded.";
    const choices = await (await answered(() => fetch(form.dataset.layers))).json();
    layers = new Map(choices.layers.map((row) => [row.path, row]));
    flat = choices.flat;
    list.replaceChildren(...choices.layers.map((row) => made("option", { value: row.path, label: `${row.channels} filters` })));
    state.textContent = `${layers.size} layers have maps.`;
  }

  async function lead() {
    await load();
    if (!layers.size) return;
    if (layers.has(layer.value)) {
      location.href = `${slug(layer.value)}/${Number(channel.value)}.html`;
      return;
    }
    const model = (await facts).model ?? "MODEL";
    const listing = `\`phosphene layers ${model}\` lists all`;
    const classes = `\`phosphene filters ${model} ${layer.value} --objective logit\` draws classes`;
    const text = flat.includes(layer.value)
      ? `${layer.value} is no layer with a map; ${listing}, and ${classes}.`
      : `There is no layer ${layer.value.replaceAll("`", "")}; choose one of the list, or ${listing}.`;
    state.replaceChildren(...spelled(text));
  }

  layer.addEventListener("focus", load);
  layer.addEventListener("input", () => {
    const chosen = layers.get(layer.value);
    channel.max = chosen ? chosen.channels - 1 : "";
    if (chosen) state.textContent = `${chosen.kind}, ${chosen.channels} filters: 0 to ${chosen.channels - 1}.`;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    lead();
  });
}

// ---- a visitor's photo

function visitor(root) {
  const part = (id) => document.getElementById(id);
  const [drop, file, state, seen] = ["drop", "file", "state", "seen"].map(part);
  const [how, classes, otherClass, method, layer] = ["how", "classes", "other", "method", "layer"].map(part);
  const [group, channels] = ["group", "channels"].map(part);
  const under = new Map();
  let photo = null; // the last one that the server has read
  let coming = null; // the one that it has not answered yet
  let excited = null;
  let drawing = null; // the last answer to `accent`
  let top = "";
  let turn = 0;

  // a new request of a kind replaces the one before
  const ask = async (kind, values = {}, body = photo) => {
    under.get(kind)?.abort();
    const mine = new AbortController();
    under.set(kind, mine);
    const query = new URLSearchParams(Object.entries(values).filter(([, value]) => value));
    const send = () => fetch(`${kind}?${query}`, { method: "POST", body, signal: mine.signal });
    return answered(send);
  };

  const trying = async (work, doing = "Looking …") => {
    const mine = ++turn;
    state.textContent = doing;
    root.setAttribute("aria-busy", "true");
    try {
      await work();
      if (turn === mine) state.textContent = ""; // a later message stays
    } catch (error) {
      if (error.name === "AbortError") return;
      state.textContent = errorSentence(error);
    }
    if (turn === mine) root.removeAttribute("aria-busy");
  };

  const bar = (share) => {
    const svg = drawn("svg", { viewBox: "0 0 100 6", preserveAspectRatio: "none", "aria-hidden": "true" });
    svg.append(drawn("rect", { class: "whole", width: 100, height: 6 }), drawn("rect", { width: 100 * share, height: 6 }));
    return svg;
  };

  const choice = (score) =>
    made("label", {}, made("input", { type: "radio", name: "target", value: score.index }), made("span", { textContent: score.name }),
      made("b", { textContent: percent(score.probability) }), bar(score.probability));

  const listed = (scores, chosen) => {
    const now = JSON.stringify(scores);
    if (now !== top) {
      classes.replaceChildren(classes.querySelector("legend"), ...scores.map(choice));
      top = now;
    }
    for (const input of classes.querySelectorAll("input")) input.checked = Number(input.value) === chosen;
  };

  const target = () => otherClass.value.trim() || (classes.querySelector("input:checked")?.value ?? "");

  const unread = (name, why) => {
    const reason = why.replace(/^The /, "the ").replace(/\.$/, "");
    return `${name} was not read: ${reason}${photo ? "; this is still the one before" : ""}.`;
  };

  // a new photo replaces the one before once the server has read it, and is shown with its own first class
  async function look() {
    const mine = coming;
    const content = mine ? mine.content : photo;
    if (!content) return;
    const values = { method: method.value, layer: layer.disabled ? "" : layer.value, target: mine ? "" : target() };
    let result;
    try {
      result = await (await ask("photo", values, content)).json();
    } catch (error) {
      if (!mine || error.name === "AbortError") throw error;
      if (coming === mine) coming = null;
      throw new Error(unread(mine.name, errorSentence(error)));
    }
    if (mine) {
      photo = content;
      coming = null;
      otherClass.value = "";
      for (const input of classes.querySelectorAll("input")) input.checked = false;
    }
    heat(result, values.layer === "");
    if (!mine) return;
    seen.hidden = false;
    part("blend").hidden = true;
    await Promise.all([filters(), sheet(), fill()]);
    const [strongest] = excited?.strongest ?? [];
    if (strongest) [part("accented").value, part("filter").value] = [strongest.layer, strongest.channel];
  }

  function heat(result, usual) {
    const named = result.classes.length > 0;
    how.hidden = part("bar").hidden = !named;
    part("heat").src = result.picture;
    part("heat").alt = named ? `your photo, with a heat map of ${result.caption}` : "your photo";
    part("caption").textContent = named ? result.note ? sentence(result.note) : result.caption : "";
    part("unnamed").hidden = named;
    part("unnamed").textContent = named ? "" : result.note;
    if (!named) return;
    listed(result.classes, result.target.index);
    part("strongest").textContent = short(result.strongest);
    part("bar").hidden = result.note !== "";
    part("caution").hidden = !result.caution;
    part("caution").textContent = result.caution && `${result.method}: ${result.caution}.`;
    layer.disabled = result.layer === "input";
    if (usual && !layer.disabled) layer.options[0].textContent = `the last one with a map (${result.layer})`;
  }

  const portrait = (filter) =>
    made("li", {}, made("a", { href: filter.page },
      made("img", { src: filter.picture, alt: `filter ${filter.channel} of ${filter.layer}`, loading: "lazy" }),
      made("b", { textContent: `${filter.excitation.toFixed(2)}` }),
      made("i", { textContent: filter.words, className: filter.verdict }),
      made("span", {}, ...breaking(filter.layer)),
      made("span", { textContent: `filter ${filter.channel}` })));

  const gallery = () => {
    if (!excited) return;
    const filters = group.value ? excited.layers.find((row) => row.path === group.value).filters : excited.strongest;
    part("filters").replaceChildren(...filters.map(portrait));
  };

  // results of the photo before do not stay under a new one
  const without = (wipe) => (error) => {
    if (error.name !== "AbortError") wipe();
    throw error;
  };

  async function filters() {
    const answer = await ask("excited").catch(without(() => {
      excited = null;
      part("filters").replaceChildren();
    }));
    excited = await answer.json();
    const before = group.value;
    group.replaceChildren(made("option", { value: "", textContent: "all layers" }),
      ...excited.layers.map((row) => made("option", { textContent: row.path, selected: row.path === before })));
    const measure = excited.photos
      ? `1 is as strongly as the strongest of the ${excited.photos.toLocaleString("en")} photos that this atlas was made with, 0 is their mean.`
      : "1 is as strongly as the filter's own picture, 0 as little as plain grey.";
    part("basis").textContent = `${measure} For this the network sees your photo at ${excited.size.join("×")} px, as it saw those.`;
    gallery();
  }

  async function sheet() {
    const image = part("sheet");
    const answer = await ask("activations", { layer: channels.value }).catch(without(() => image.removeAttribute("src")));
    const content = await answer.blob();
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(content);
    image.alt = `what each channel of ${channels.value} answers to your photo`;
  }

  // the picture of an amount is the full one over the photo, with the amount as its opacity
  async function accent() {
    const [before, after, blend] = ["before", "after", "blend"].map(part);
    const [path, number] = [part("accented").value, part("filter").value];
    const answer = await ask("accentuated", { layer: path, channel: number }).catch(without(() => (blend.hidden = true)));
    drawing = await answer.json();
    drawing.name = number === "" ? `all that ${path} sees` : `filter ${number} of ${path}`;
    [before.src, before.alt] = [drawing.before, "your photo"];
    [after.src, after.alt] = [drawing.after, `your photo, with what excites ${drawing.name} drawn into it`];
    part("amount").value = 100;
    blend.hidden = false;
    weigh();
  }

  function weigh() {
    const share = part("amount").value / 100;
    const { amounts, responses, name } = drawing;
    const step = Math.min(amounts.length - 2, Math.floor(share * (amounts.length - 1)));
    const rest = share * (amounts.length - 1) - step;
    const response = responses.includes(null) ? null : (1 - rest) * responses[step] + rest * responses[step + 1];
    part("after").style.opacity = share;
    part("answer").textContent = `${name}: ${short(response)}, in your photo ${short(responses[0])}`;
    part("amount").setAttribute("aria-valuetext", `${part("amount").value} percent, response ${short(response)}`);
  }

  function show(content, name = content?.name || "the photo") {
    if (!content || root.hidden) return;
    const why = { 0: "The file is empty" }[content.size] ?? (content.size > MOST ? "The file is larger than 20 MB" : "");
    if (why) {
      state.textContent = photo ? unread(name, why) : sentence(why);
      return;
    }
    coming = { content, name };
    trying(look);
  }

  let filled = false;
  const fill = async () => {
    if (filled) return;
    filled = true;
    const answer = await fetch("layers.json").catch(() => ({ ok: false }));
    if (!answer.ok) {
      filled = false; // the layers of the atlas are there
      return;
    }
    const choices = await answer.json();
    part("names").replaceChildren(...choices.classes.map((name) => made("option", { value: name })));
    for (const select of root.querySelectorAll("select[data-fill]")) {
      const listed = new Set([...select.options].map((option) => option.value));
      const others = choices.layers.filter((row) => !listed.has(row.path)).map((row) => made("option", { textContent: row.path }));
      if (others.length) select.append(made("optgroup", { label: "other layers with a map" }, ...others));
    }
  };

  openRecipes(root, root);
  file.addEventListener("change", () => {
    show(file.files[0]);
    file.value = ""; // so that the same file can be chosen again
  });
  part("cat").addEventListener("click", () => {
    trying(async () => show(await (await answered(() => fetch(root.dataset.example))).blob(), "the cat"));
  });
  for (const [kind, over] of [["dragenter", true], ["dragover", true], ["dragleave", false], ["drop", false]]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", over);
    });
  }
  addEventListener("drop", (event) => show(event.dataTransfer.files[0]));
  addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
    if (pasted) event.preventDefault();
    show(pasted);
  });
  how.addEventListener("submit", (event) => event.preventDefault());
  how.addEventListener("change", (event) => {
    if (event.target.type === "radio") otherClass.value = "";
    trying(look);
  });
  group.addEventListener("change", gallery);
  channels.addEventListener("change", () => trying(sheet));
  part("accent").addEventListener("submit", (event) => {
    event.preventDefault();
    trying(accent, "Drawing …");
  });
  part("amount").addEventListener("input", weigh);
  for (const input of [otherClass, layer, channels, part("accented")]) input.addEventListener("focus", fill);
}

for (const [id, begin] of [["render", easel], ["any", anything], ["visitor", visitor]]) {
  const root = document.getElementById(id);
  if (root) begin(root);
}
