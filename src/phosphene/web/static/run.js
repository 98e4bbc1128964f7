// A training run: the slider chooses the epoch, the list the layer. Both stand in the address, so that a view can be
// sent to somebody and the back button goes back. No module: browsers load none from files.
{
  "use strict";

  const part = document.getElementById("run");
  if (part) start(part);

  function start(part) {
    const { epochs, metrics, marks, gradients } = JSON.parse(part.dataset.figures);
    const form = part.querySelector("form.player");
    const { layer, epoch: slider, play } = form.elements;
    const all = part.querySelector("input[name=all]");
    const rows = [...part.querySelectorAll("table.sizes tbody tr")];
    const requested = Object.fromEntries([...part.querySelectorAll("[data-shows]")].map((figure) => [figure.dataset.shows, ""]));
    let timer = 0, moved = 0;

    const set = (selector, text) => document.querySelectorAll(selector).forEach((element) => { element.textContent = text; });
    const chosen = () => layer?.selectedOptions[0];

    // The path of a picture; if filters were not rendered after this epoch, that of the last before it.
    function address(noun, epoch) {
      const { base, kernels, filters } = chosen().dataset;
      if (noun === "kernels") return kernels ? [`${base}/kernels_${epoch}.png`, epoch] : null;
      const rendered = filters.split(" ").filter(Boolean).map(Number);
      const at = rendered.findLast((number) => number <= epoch) ?? rendered[0];
      return at === undefined ? null : [`${base}/filters_${at}.png`, at];
    }

    // A picture replaces the one before once it is loaded, so that nothing flickers.
    async function show(figure, epoch) {
      const noun = figure.dataset.shows;
      const source = address(noun, epoch);
      figure.hidden = !source;
      requested[noun] = source?.[0];
      if (!source) return;
      const [path, at] = source;
      const next = new Image();
      next.src = path;
      await next.decode().catch(() => {});
      if (requested[noun] !== path) return;
      const picture = figure.querySelector("img");
      picture.src = path;
      picture.alt = `${layer.value}, ${noun === "kernels" ? "its kernels" : "what its filters respond to"} after epoch ${at}`;
      figure.querySelector("a").href = path;
      figure.querySelector(".of").textContent = at;
    }

    function draw() {
      const place = Number(slider.value), epoch = epochs[place];
      slider.setAttribute("aria-valuetext", `epoch ${epoch}`);
      set(".epoch", epoch);
      metrics[place].forEach((text, number) => set(`[data-metric="${number}"]`, text || "–"));
      marks[place].forEach((at, number) => {
        const circle = part.querySelector(`[data-mark="${number}"]`);
        circle.setAttribute("visibility", at ? "visible" : "hidden");
        if (at) { circle.setAttribute("cx", at[0]); circle.setAttribute("cy", at[1]); }
      });
      const ownRows = (chosen()?.dataset.own ?? "").split(" ").filter(Boolean).map(Number);
      const showAll = !all || all.checked || !ownRows.length;
      const lines = gradients[place].split("|").map((line) => line.split(" "));
      rows.forEach((row, number) => {
        row.hidden = !showAll && !ownRows.includes(number);
        row.classList.toggle("own", ownRows.includes(number));
        [...row.cells].slice(1).forEach((cell, column) => { cell.textContent = lines[number][column]; });
      });
      if (all) all.parentElement.hidden = !ownRows.length;
      if (!layer) return Promise.resolve();
      set(".which", layer.value);
      return Promise.all([...part.querySelectorAll("[data-shows]")].map((figure) => show(figure, epoch)));
    }

    function strip() {
      const link = document.querySelector("a.reel");
      if (!link) return;
      const path = `${chosen().dataset.base}/strip.png`;
      link.href = path;
      Object.assign(link.firstElementChild, { src: path, alt: `Film strip of ${layer.value}, one row per epoch` });
    }

    // For pages opened as files some browsers forbid another address; the view then works, but its address stays.
    function remember(replace) {
      const query = new URLSearchParams({ ...(layer && { layer: layer.value }), epoch: epochs[slider.value] });
      try { history[replace ? "replaceState" : "pushState"](null, "", `?${query}`); } catch { /* as above */ }
    }

    function recall() {
      stop();
      const query = new URLSearchParams(location.search);
      const place = epochs.indexOf(Number(query.get("epoch") ?? NaN));
      slider.value = place < 0 ? epochs.length - 1 : place;
      const options = [...(layer?.options ?? [])];
      (options.find((option) => option.value === query.get("layer")) ?? options.find((option) => option.defaultSelected) ?? {}).selected = true;
      strip();
      draw();
    }

    async function step() {
      const pause = Math.min(800, Math.max(150, 8000 / epochs.length));
      slider.value = (Number(slider.value) + 1) % epochs.length;
      const [mine] = [timer, await Promise.all([draw(), new Promise((resolve) => setTimeout(resolve, pause))])];
      if (!timer || mine !== timer) return;
      if (Number(slider.value) === epochs.length - 1) { stop(); remember(true); } else step();
    }

    function stop() {
      timer = 0;
      play.textContent = "Play";
    }

    play.addEventListener("click", () => {
      if (timer) { stop(); remember(true); return; }
      timer = Date.now();
      play.textContent = "Pause";
      step();
    });
    slider.addEventListener("input", () => { stop(); draw(); });
    slider.addEventListener("change", () => {
      remember(Date.now() - moved < 1000); // a key held down is one step back
      moved = Date.now();
    });
    layer?.addEventListener("change", () => { strip(); draw(); remember(false); });
    all?.addEventListener("change", draw);
    form.addEventListener("submit", (event) => event.preventDefault());
    addEventListener("popstate", recall);
    form.hidden = false;
    recall();
  }
}
