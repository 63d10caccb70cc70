// What every page shares: the data, elements made of text that stays text, figures with their tables and CSV files.

// The block behind <script id="data">: see pages/page.py, pack.
async function unpack() {
  const text = document.getElementById("data").textContent;
  const letters = atob(text);
  const packed = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) packed[i] = letters.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = await new Response(stream).arrayBuffer();
  const length = new DataView(raw).getUint32(0, true);
  const both = JSON.parse(new TextDecoder().decode(new Uint8Array(raw, 4, length)));
  const types = {
    uint8: Uint8Array,
    int8: Int8Array,
    uint16: Uint16Array,
    int16: Int16Array,
    int32: Int32Array,
    float32: Float32Array,
  };
  const arrays = {};
  for (const [name, entry] of Object.entries(both.arrays)) {
    const count = entry.shape.reduce((a, b) => a * b, 1);
    arrays[name] = new types[entry.dtype](raw, 4 + length + entry.offset, count);
    arrays[name].shape = entry.shape;
  }
  return { data: both.data, arrays };
}

// Makes an element. Children that are no nodes become text nodes: there is no other way from data into the page.
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

// A name that came from a data set or a file: kept in its own direction, cut where it is very long.
function nameOf(text, most = 60) {
  text = String(text);
  const shown = text.length > most ? text.slice(0, most) + "…" : text;
  return el("bdi", { title: text.length > most ? `${text.slice(0, 400)} (${text.length} characters)` : null }, shown);
}

function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en-US");
  if (size >= 1e7 || size < 1e-4) return value.toExponential(Math.max(0, digits - 2));
  return String(Number(value.toPrecision(digits)));
}

const percent = (value, digits = 1) =>
  value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`;

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function csvText(header, rows) {
  // A spreadsheet takes a cell that begins with one of these for a formula. An apostrophe makes it text; numbers stay.
  const cell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (/^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text))) text = "'" + text;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [header, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function saveCsv(name, header, rows) {
  const link = el("a", {
    download: name,
    href: URL.createObjectURL(new Blob([csvText(header, rows)], { type: "text/csv" })),
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function table(caption, header, rows, { most = 2000, changed = null } = {}) {
  const isNumber = header.map(
    (_, column) => rows.length > 0 && rows.every((row) => row[column] === null || typeof row[column] === "number"),
  );
  const cell = (value, column) =>
    el(
      "td",
      { class: isNumber[column] ? "number" : null },
      value instanceof Node ? value : isNumber[column] ? number(value, 5) : nameOf(value ?? "–", 200),
    );
  const left =
    rows.length > most
      ? ` The first ${most.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")} rows; the CSV file has all.`
      : "";
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      {},
      el("caption", {}, caption + left),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          header.map((name, column) =>
            el("th", { scope: "col", class: isNumber[column] ? "number" : null }, nameOf(name)),
          ),
        ),
      ),
      el(
        "tbody",
        {},
        rows
          .slice(0, most)
          .map((row, index) => el("tr", { class: changed?.(row, index) ? "changed" : null }, row.map(cell))),
      ),
    ),
  );
}

let figureCount = 0;

// A titled figure that can be enlarged, and whose numbers are a table for screen readers and a CSV file.
// `numbers()` returns { header, rows }; it is called when somebody asks.
function figure(title, body, { note = null, numbers = null, wide = false, isTable = false } = {}) {
  const id = `figure${++figureCount}`;
  const slug = title
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "_")
    .slice(0, 60);
  const place = el("div", {}, body);
  const enlarge = () => {
    const box = el("dialog", { "aria-labelledby": id });
    const close = el("button", { onclick: () => box.close() }, "Close");
    box.addEventListener("close", () => {
      place.append(body);
      box.remove();
      body.redraw?.();
    });
    box.append(el("div", { class: "bar" }, el("h3", {}, title), close), body);
    document.body.append(box);
    box.showModal();
    body.redraw?.();
  };
  const node = el(
    "figure",
    { class: wide ? "wide" : null, "aria-labelledby": id },
    el(
      "div",
      { class: "head" },
      el("h3", { id }, title),
      el("button", { onclick: enlarge, "aria-label": `Enlarge: ${title}` }, "enlarge"),
      numbers &&
        el(
          "button",
          {
            onclick: () => {
              const n = numbers();
              saveCsv(`${slug}.csv`, n.header, n.rows);
            },
            "aria-label": `CSV: ${title}`,
          },
          "CSV",
        ),
    ),
    place,
    note && el("figcaption", {}, note),
  );
  if (numbers && !isTable) {
    const details = el("details", {}, el("summary", {}, "Numbers as a table"));
    node.refresh = () => {
      details.querySelector(".scroll")?.remove();
      if (details.open) {
        const n = numbers();
        details.append(table(title, n.header, n.rows));
      }
    };
    details.addEventListener("toggle", node.refresh);
    node.append(details);
  }
  return node;
}

// A figure that is a table.
function tableFigure(title, caption, header, rows, options = {}) {
  const body = table(caption, header, rows, options);
  return figure(title, body, { wide: true, isTable: true, numbers: () => ({ header, rows }) });
}

// The first line of a page: its title, what else is to say, and the colours.
function topBar(title, detail = null) {
  return el(
    "header",
    { class: "top" },
    el("h1", {}, title),
    detail && el("span", { class: "soft" }, detail),
    el("span", { class: "spring" }),
    themeSwitch(),
  );
}

// A command, which breaks before its flags and not inside them.
function commandLine(text) {
  const words = (text ?? "the command was not recorded").split(/ (?=--)/);
  return el(
    "pre",
    {},
    words.map((word) => [el("span", { class: "word" }, word), " "]),
  );
}

function bullets(texts) {
  return el(
    "ul",
    { class: "plain" },
    texts.map((text) => el("li", {}, text)),
  );
}

// One choice of several, as a row of buttons. `choose(value)` is called with the new value.
function choice(label, options, value, choose) {
  const buttons = options.map(([key, text]) =>
    el("button", { "aria-pressed": String(key === value), "data-value": String(key), onclick: () => set(key) }, text),
  );
  const set = (key) => {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(options[index][0] === key)));
    choose(key);
  };
  return el("span", { class: "group", role: "group", "aria-label": label, title: label }, buttons);
}

function themeSwitch() {
  return choice(
    "Colours",
    [
      ["light dark", "Auto"],
      ["light", "Light"],
      ["dark", "Dark"],
    ],
    "light dark",
    (scheme) => {
      document.documentElement.style.colorScheme = scheme;
      document.dispatchEvent(new Event("theme"));
    },
  );
}

function fact(name, value, detail = null) {
  return el(
    "div",
    {},
    el("div", { class: "name" }, name),
    el("div", { class: "value" }, value),
    detail && el("div", { class: "detail" }, detail),
  );
}

function section(title, ...children) {
  return el("section", { "aria-label": title }, el("h2", {}, title), children);
}

// Runs a page; what goes wrong is said on the page itself and in the console.
async function start(draw) {
  const main = el("main");
  document.body.append(main);
  try {
    const { data, arrays } = await unpack();
    draw(main, data, arrays);
    document.body.dataset.ready = "yes";
  } catch (error) {
    main.append(el("p", { role: "alert" }, `This page could not be drawn: ${error}`));
    throw error;
  }
}
