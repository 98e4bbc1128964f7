"use strict";
// Browsing: sorts and filters the pictures of a layer, and moves by keys. Without it the pages stand as they are.
{
  const MOVES = { ArrowLeft: "prev", ArrowRight: "next" };

  const plain = (event) => !(event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || event.defaultPrevented);

  // A picture that cannot be loaded is hidden, and a sentence on top says so, in the server's words if there is one.
  const lost = new Set();
  const telling = document.createElement("p");
  telling.className = "note";
  telling.setAttribute("role", "status");
  document.getElementById("main").prepend(telling);

  const reason = async (url) => {
    const answer = await fetch(url);
    if (answer.ok) throw new Error("it is there");
    const message = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main p");
    return message.textContent;
  };

  const missing = async (address) => {
    const url = new URL(address, location.href);
    for (const picture of document.querySelectorAll("main image, main img")) {
      if (new URL(picture.getAttribute("href") ?? picture.src, location.href).href === url.href) picture.classList.add("broken");
    }
    if (lost.has(url.href)) return;
    lost.add(url.href);
    if (lost.size > 1) return;
    const name = decodeURIComponent(url.pathname.split("/").slice(-2).join("/"));
    const general = `A file of this page is missing or damaged: ${name}. Run the atlas again to mend the store.`;
    telling.textContent = location.protocol.startsWith("http") ? await reason(url).catch(() => general) : general;
  };

  const addressed = (picture) => picture.getAttribute("href") ?? picture.getAttribute("src") ?? "";
  const isFilePicture = (picture) => /\.(webp|png)$/.test(addressed(picture)) && !picture.closest(".live");
  const failed = (event) => {
    if (event.target.matches?.("main image, main img") && isFilePicture(event.target)) missing(addressed(event.target));
  };
  document.addEventListener("error", failed, true);
  // those that failed before this ran; pictures that are loaded are not requested again
  const before = [...document.querySelectorAll("main image, main img")].filter(isFilePicture).map(addressed);
  for (const address of new Set(before)) {
    const probe = new Image();
    probe.onerror = () => missing(address);
    probe.src = address;
  }

  // How a layer's pictures were chosen and sorted is kept until the tab is closed, and leads from filter to filter.
  const folder = location.pathname.slice(0, location.pathname.lastIndexOf("/") + 1);
  const course = {
    keep(query, filters) {
      try {
        if (query) sessionStorage.setItem(folder, JSON.stringify({ asked: query, filters }));
        else sessionStorage.removeItem(folder);
      } catch {
        // a browser that keeps nothing: filters go by their numbers
      }
    },
    kept() {
      try {
        return JSON.parse(sessionStorage.getItem(folder));
      } catch {
        return null;
      }
    },
  };

  const toward = (rel, n) => {
    const [link, arrow] = [document.createElement("a"), document.createElement("span")];
    arrow.setAttribute("aria-hidden", "true");
    arrow.textContent = rel === "prev" ? "←" : "→";
    link.append(...(rel === "prev" ? [arrow, ` filter ${n}`] : [`filter ${n} `, arrow]));
    return Object.assign(link, { rel, href: `${n}.html` });
  };

  // Left and right go to the filter before and after, except where these keys mean something already.
  const around = document.getElementById("around");
  const way = around && course.kept();
  const at = way ? way.filters.indexOf(location.pathname.slice(folder.length).replace(/\.html$/, "")) : -1;
  if (at >= 0) {
    const back = Object.assign(document.createElement("a"), { textContent: `${at + 1} of ${way.filters.length} in the grid` });
    back.href = `index.html?${way.asked}#f${way.filters[at]}`;
    const sides = { prev: way.filters[at - 1], next: way.filters[at + 1] };
    const links = Object.entries(sides).map(([rel, n]) => (n === undefined ? document.createElement("span") : toward(rel, n)));
    around.replaceChildren(links[0], back, links[1]);
  }
  if (around) {
    document.addEventListener("keydown", (event) => {
      const busy = event.target.closest("input, select, textarea, [contenteditable], .scroll, pre, #render");
      const link = MOVES[event.key] && plain(event) && !busy && around.querySelector(`a[rel=${MOVES[event.key]}]`);
      if (link) {
        event.preventDefault();
        link.click();
      }
    });
  }

  const grid = document.getElementById("grid");
  const form = document.getElementById("sorting");
  if (grid && form) {
    const cells = [...grid.children]; // in the order of their numbers
    const boxes = [...form.querySelectorAll("[name=verdict]")];
    const reset = document.getElementById("reset");
    const keys = { excitation: "e", stability: "t", score: "c" };
    let visible = cells;
    let current = null;

    const number = (cell, key) => (key in cell.dataset ? Number(cell.dataset[key]) : null);

    // The highest first, or `turned` the lowest; cells without the figure last; if two are equal, the lower number first.
    const sorted = (by, turned) => {
      if (!keys[by]) return turned ? [...cells].reverse() : cells;
      const figures = new Map(cells.map((cell) => [cell, number(cell, keys[by])]));
      return [...cells].sort((left, right) => {
        const [a, b] = [figures.get(left), figures.get(right)];
        return a === null || b === null ? (a === null) - (b === null) : turned ? a - b : b - a;
      });
    };

    const state = () => {
      const query = new URLSearchParams();
      if (form.sort.value !== "index") query.set("sort", form.sort.value);
      if (form.turned.checked) query.set("turned", "1");
      const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
      if (chosen.length < boxes.length) query.set("verdict", chosen.join(" "));
      if (form.least && form.least.value !== "") query.set("least", form.least.value);
      return query;
    };

    const set = (query) => {
      const by = query.get("sort");
      form.sort.value = [...form.sort.options].some((option) => option.value === by) ? by : "index";
      form.turned.checked = query.has("turned");
      const named = query.get("verdict");
      const chosen = boxes.map((box) => box.value).filter((verdict) => named?.split(" ").includes(verdict));
      const all = named === null || (named !== "" && !chosen.length); // unknown ones do not count
      for (const box of boxes) box.checked = all || chosen.includes(box.value);
      const least = Number(query.get("least") || NaN);
      if (form.least) form.least.value = Number.isFinite(least) ? least : "";
    };

    const show = () => {
      const chosen = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
      const least = form.least && form.least.value !== "" ? Number(form.least.value) : null;
      const order = sorted(form.sort.value, form.turned.checked);
      for (const cell of cells) {
        const excitation = number(cell, "e");
        const judged = !boxes.length || !cell.dataset.v || chosen.has(cell.dataset.v);
        cell.hidden = !judged || (least !== null && !(excitation !== null && excitation >= least));
      }
      if (order.some((cell, at) => grid.children[at] !== cell)) {
        const active = document.activeElement; // which loses the focus when it is moved
        grid.replaceChildren(...order);
        if (grid.contains(active)) active.focus({ preventScroll: true });
      }
      visible = order.filter((cell) => !cell.hidden);
      const count = `${visible.length} of ${cells.length}`;
      document.getElementById("shown").textContent = visible.length ? count : "No filter matches.";
      reset.hidden = visible.length > 0;
      if (!visible.includes(current)) choose(visible[0] ?? null);
    };

    // One link of the grid is in the order of the tab key; the arrows move which.
    const choose = (cell) => {
      if (current) current.firstElementChild.tabIndex = -1;
      current = cell;
      if (current) current.firstElementChild.tabIndex = 0;
    };

    const keep = (how) => {
      const query = state().toString();
      const url = `${location.pathname}${query && `?${query}`}`;
      if (url === location.pathname + location.search) return;
      try {
        history[how](null, "", url);
      } catch {
        // a browser that lets no file change its address: the page works, and its address stays
      }
    };

    const columns = () => getComputedStyle(grid).gridTemplateColumns.split(" ").length;

    const aim = (key) => {
      const at = visible.indexOf(current);
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
      if (key === "Home") return 0;
      if (key === "End") return visible.length - 1;
      return key in steps ? at + steps[key] : null;
    };

    grid.addEventListener("keydown", (event) => {
      const to = plain(event) ? aim(event.key) : null;
      if (to === null) return;
      event.preventDefault();
      if (!visible[to]) return;
      choose(visible[to]);
      current.firstElementChild.focus();
    });
    grid.addEventListener("focusin", (event) => choose(event.target.closest("li")));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => {
      show();
      keep(event.target.type === "number" ? "replaceState" : "pushState");
    });
    reset.addEventListener("click", () => {
      set(new URLSearchParams());
      show();
      keep("pushState");
      current.firstElementChild.focus({ preventScroll: true }); // as the button is gone
    });

    // A visitor who comes back from a filter goes on from its picture.
    const arrive = () => {
      const id = history.state?.from ?? location.hash.slice(1);
      const named = id && document.getElementById(id);
      if (!named || !grid.contains(named) || named.parentElement.hidden) return;
      choose(named.parentElement);
      named.scrollIntoView({ block: history.state?.from ? "nearest" : "center" });
      named.focus({ preventScroll: true });
    };
    grid.addEventListener("click", (event) => {
      const link = event.target.closest("a");
      if (link) course.keep(state().toString(), visible.map((cell) => cell.firstElementChild.id.slice(1)));
      try {
        if (link) history.replaceState({ from: link.id }, "");
      } catch {
        // as above
      }
    });
    const restore = () => {
      set(new URLSearchParams(location.search));
      show();
    };
    window.addEventListener("popstate", restore);
    window.addEventListener("pageshow", (event) => {
      if (!event.persisted) restore(); // after the browser put fields back
      arrive();
    });

    form.hidden = false;
    for (const cell of cells) cell.firstElementChild.tabIndex = -1;
    restore();
  }
}
