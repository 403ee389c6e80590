"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";

  // Text from data is only ever set as textContent, never parsed as markup.
  const make = (tag, { cls, text, ...rest } = {}, ...children) => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (text !== undefined) node.textContent = text;
    for (const [key, value] of Object.entries(rest)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const shape = (tag, attributes) => {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const signed = (value, power) => {
    if (value === null || value === undefined) return "–";
    const body = Math.abs(value / 10 ** power).toFixed(2);
    const sign = Number(body) === 0 ? "" : value > 0 ? "+" : "−";
    return sign + body;
  };
  const raised = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const tens = (power) => (power ? " ×10" + [...String(power)].map((c) => raised[c]).join("") : "");

  // Sorting: a button in each sortable head, rows without a number last in both directions.
  const keyOf = (row, column, kind) => {
    const cell = row.cells[column];
    if (kind === "text") return cell.textContent.trim();
    const value = parseFloat(cell.dataset.v);
    return Number.isFinite(value) ? value : null;
  };
  const sortBy = (table, head, column) => {
    const kind = head.dataset.sort;
    const now = head.getAttribute("aria-sort");
    const down = now ? now === "ascending" : kind === "number";
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, column, kind), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      const order = kind === "text" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
      return down ? -order : order;
    });
    table.tHead.querySelectorAll("[aria-sort]").forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...rows.map(([, row]) => row));
    if (table.dataset.folded) fold(table, true);
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (!head.dataset.sort) return;
      const button = make("button", { cls: "sort", type: "button" });
      button.append(...head.childNodes);
      button.addEventListener("click", () => sortBy(table, head, column));
      head.append(button);
    });
  });

  // Long tables show their first rows; one button shows the rest.
  function fold(table, folded) {
    const limit = Number(table.dataset.fold);
    [...table.tBodies[0].rows].forEach((row, i) => { row.hidden = folded && i >= limit; });
    if (folded) table.dataset.folded = "1"; else delete table.dataset.folded;
  }
  document.querySelectorAll("table.fold").forEach((table) => {
    const total = table.tBodies[0].rows.length;
    const limit = Number(table.dataset.fold);
    if (total <= limit + 3) return;
    const button = make("button", { cls: "more-rows", type: "button", "aria-expanded": "false" });
    const label = () => { button.textContent = table.dataset.folded ? `Show all ${total}` : `Show the first ${limit}`; };
    button.addEventListener("click", () => {
      fold(table, !table.dataset.folded);
      button.setAttribute("aria-expanded", String(!table.dataset.folded));
      label();
    });
    fold(table, true);
    label();
    table.parentElement.after(button);
    window.addEventListener("beforeprint", () => { fold(table, false); label(); });
  });

  // Filters of the example table.
  const exampleTable = document.getElementById("example-table");
  const filters = document.getElementById("filters");
  const visible = () => [...exampleTable.tBodies[0].rows].filter((row) => !row.hidden).map((row) => Number(row.dataset.index));
  if (exampleTable && filters) {
    const texts = data.examples.map((p) => [p.id, p.label, p.category, p.source, p.prompt, p.response, p.rejected].join("\n").toLowerCase());
    const apply = () => {
      const field = filters.elements;
      const words = field.q.value.toLowerCase().split(/\s+/).filter(Boolean);
      const category = field.category ? field.category.value : "";
      let shown = 0;
      for (const row of exampleTable.tBodies[0].rows) {
        const example = data.examples[row.dataset.index];
        const fits = words.every((w) => texts[row.dataset.index].includes(w))
          && (!field.label || !field.label.value || example.label === field.label.value)
          && (!category || example.category === category)
          && (!field.unintended || !field.unintended.checked || example.unintended);
        row.hidden = !fits;
        shown += fits;
      }
      field.count.textContent = `${shown} of ${data.examples.length}`;
    };
    filters.addEventListener("input", apply);
    filters.addEventListener("submit", (event) => event.preventDefault());
  }

  // The drawer with one example.
  const drawer = document.getElementById("drawer");
  const featureName = (id) => data.features[id] || "";
  const stacked = (x, y, largest) => {
    const width = 150, half = width / 2, unit = (half - 1) / (largest || 1);
    const svg = shape("svg", { width: "100%", height: 12, viewBox: `0 0 ${width} 12`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const ends = { 1: half, "-1": half };
    for (const [value, cls] of [[x, "px"], [y, "py"]]) {
      const side = value >= 0 ? 1 : -1, length = Math.abs(value) * unit;
      const from = side > 0 ? ends[1] : ends[-1] - length;
      svg.append(shape("rect", { class: cls, x: from, y: 2, width: length, height: 8 }));
      ends[side] += side * length;
    }
    svg.append(shape("line", { class: "zero", x1: half, x2: half, y1: 0, y2: 12 }));
    return svg;
  };
  const swatch = (cls, text) => [make("span", { cls: `swatch ${cls}` }), ` ${text} `];
  const coefficients = (example) => {
    if (!example.top.length) return [];
    const power = data.powers.W;
    const largest = Math.max(...example.top.map(([, x, y]) => Math.max(Math.abs(x) + Math.abs(y))));
    const head = make("div", { cls: "shift header" }, make("span", { text: "bold: intended" }), make("span", {}, ...swatch("px", "x"), ...swatch("py", "y")),
      make("span", { cls: "num", text: "x" }), make("span", { cls: "num", text: "y" }));
    const rows = example.top.map(([id, x, y]) => make("div", { cls: "shift" },
      make("span", { cls: example.intended.includes(id) ? "name own" : "name", title: featureName(id) },
        make("a", { href: `#feature-${id}`, text: String(id) }), ` ${featureName(id)}`),
      stacked(x, y, largest), make("span", { cls: "num", text: signed(x, power) }), make("span", { cls: "num", text: signed(y, power) })));
    return [make("h4", { text: `Coefficients that move most${tens(power)}` }), head, ...rows];
  };
  const moves = (example) => {
    if (!example.moves.length) return [];
    const power = data.powers.y;
    const rows = example.moves.map(([at, dy]) => {
      const [id, group, text] = data.prompts[at];
      return make("li", {}, make("span", { cls: `num ${dy > 0 ? "posText" : "negText"}`, text: signed(dy, power) }),
        make("span", { cls: "words" }, make("bdi", { text }), " ", make("span", { cls: "soft", text: `${id} · ${group}` })));
    });
    return [make("h4", { text: `Evaluation prompts whose behavior moves most${tens(power)}` }), make("ol", { cls: "examples" }, ...rows)];
  };
  const fact = (name, value) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }));
  const body = (example) => make("div", { cls: "drawer-body" },
    make("h3", { id: "drawer-title", text: example.id }),
    make("p", { cls: "sub", text: [example.label, example.category, example.source].filter(Boolean).join(" · ") }),
    make("dl", { cls: "facts small" },
      ...data.targets.map(([name, power], i) => fact(name + tens(power), signed(example.values[i], power))),
      fact("Loss", example.loss === null ? "–" : example.loss.toFixed(2)), fact("Tokens", String(example.n ?? "–")),
      ...(example.dominant === null ? [] : [fact("Acts mainly on", `${example.dominant}${example.unintended ? " (unintended)" : ""}`)])),
    make("h4", { text: "Prompt" }), make("p", { cls: "said", dir: "auto", tabindex: "0", text: example.prompt }),
    make("h4", { text: example.rejected ? "Chosen" : "Response" }),
    make("p", { cls: "said", dir: "auto", tabindex: "0", text: example.response }),
    ...(example.rejected
      ? [make("h4", { text: "Rejected" }), make("p", { cls: "said", dir: "auto", tabindex: "0", text: example.rejected })]
      : []),
    ...coefficients(example), ...moves(example));
  const open = (index) => {
    const order = visible(), place = order.indexOf(index);
    const button = (text, cls, to) => {
      const node = make("button", { type: "button", cls, text });
      node.disabled = to === undefined;
      node.addEventListener("click", () => (to === null ? drawer.close() : open(to)));
      return node;
    };
    const previous = place > 0 ? order[place - 1] : undefined;
    const next = place >= 0 ? order[place + 1] : undefined;
    const bar = make("div", { cls: "drawer-bar" }, button("Previous", "previous", previous), button("Next", "next", next), button("Close", "close", null));
    const held = drawer.contains(document.activeElement) ? document.activeElement.className : "close";
    drawer.replaceChildren(bar, body(data.examples[index]));
    if (!drawer.open) drawer.showModal();
    const again = bar.querySelector(`.${["previous", "next"].includes(held) ? held : "close"}:enabled`) || bar.querySelector(".close");
    again.focus();
    drawer.scrollTop = 0;
  };
  document.querySelectorAll("span.example[data-example]").forEach((span) => {
    const button = make("button", { cls: "example id", type: "button", text: span.textContent, title: span.title, "data-example": span.dataset.example });
    span.replaceWith(button);
  });
  document.addEventListener("click", (event) => {
    if (event.target === drawer) return drawer.close();
    const link = event.target.closest("a");
    if (link) { if (drawer.open) drawer.close(); return; }
    if (drawer.contains(event.target)) return;
    const named = event.target.closest("[data-example]");
    const row = event.target.closest("#example-table tbody tr");
    if (named) open(Number(named.dataset.example));
    else if (row && !String(window.getSelection())) open(Number(row.dataset.index));
  });

  // Feature cards: links open them, the search narrows them.
  const reveal = () => {
    const card = /^#feature-\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (card) { card.hidden = false; card.open = true; card.scrollIntoView(); card.querySelector("summary").focus(); }
  };
  window.addEventListener("hashchange", reveal);
  reveal();
  const search = document.getElementById("feature-search");
  if (search) search.addEventListener("input", () => {
    const word = search.value.toLowerCase();
    document.querySelectorAll("details.feature").forEach((card) => {
      card.hidden = !card.querySelector("summary").textContent.toLowerCase().includes(word);
    });
  });

  // Read-out of the heat map.
  const heat = document.querySelector("svg.heat");
  const out = document.getElementById("heat-out");
  if (heat && out && data.heat) {
    const margin = Number(heat.dataset.margin), cell = Number(heat.dataset.cell), ids = data.heat.ids;
    heat.addEventListener("pointermove", (event) => {
      const box = heat.getBoundingClientRect(), zoom = heat.viewBox.baseVal.width / box.width;
      const j = Math.floor(((event.clientX - box.left) * zoom - margin) / cell);
      const i = Math.floor(((event.clientY - box.top) * zoom - margin) / cell);
      if (i < 0 || j < 0 || i >= ids.length || j >= ids.length) return;
      out.textContent = `${ids[i]} ${featureName(ids[i])} with ${ids[j]} ${featureName(ids[j])}: r = ${signed(data.heat.r[i][j], 0)}`;
    });
  }

  // Which section is in view.
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((a) => a.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  document.querySelectorAll("main section").forEach((section) => watcher.observe(section));
})();
