// Maps of numbers as pictures: colours, and cells on a canvas.

// Samples of matplotlib's viridis (CC0), whose lightness alone carries the order; light is high on both grounds.
const SEQUENTIAL = [
  [68, 1, 84],
  [71, 44, 122],
  [59, 81, 139],
  [44, 113, 142],
  [33, 144, 141],
  [39, 173, 129],
  [92, 200, 99],
  [170, 220, 50],
  [253, 231, 37],
];
// Blue to orange through grey: signs stay apart in every common colour blindness.
const SIGNED = [
  [0, 84, 147],
  [64, 140, 191],
  [146, 188, 215],
  [214, 222, 226],
  [238, 190, 150],
  [217, 130, 65],
  [163, 70, 0],
];

function colour(stops, t) {
  const at = Math.min(1, Math.max(0, t)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(at));
  return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * (at - low)));
}

const tableOf = (stops) => {
  const table = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i++) table.set(colour(stops, i / 255), 3 * i);
  return table;
};
const SEQUENTIAL_TABLE = tableOf(SEQUENTIAL),
  SIGNED_TABLE = tableOf(SIGNED);

// Paints values [rows x columns] onto a canvas, one pixel a cell. NaN is a cell that cannot be seen: left transparent.
// `high` is the value of the brightest colour; signed maps run from -high to high. Weights are shown by their root,
// since most of them are far below the largest.
function paint(canvas, values, rows, columns, { high, signed = false, root = !signed } = {}) {
  if (canvas.width !== columns || canvas.height !== rows) {
    canvas.width = columns;
    canvas.height = rows;
  }
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const colours = signed ? SIGNED_TABLE : SEQUENTIAL_TABLE;
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    if (Number.isNaN(value)) continue;
    let t = high > 0 ? value / high : 0;
    t = signed ? (t + 1) / 2 : root ? Math.sqrt(Math.max(0, t)) : t;
    const index = 3 * Math.round(255 * Math.min(1, Math.max(0, t)));
    pixels.data[4 * i] = colours[index];
    pixels.data[4 * i + 1] = colours[index + 1];
    pixels.data[4 * i + 2] = colours[index + 2];
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

const largest = (values) => {
  let top = 0;
  for (const value of values) if (Math.abs(value) > top) top = Math.abs(value);
  return top;
};

function scaleBar(high, { signed = false, root = !signed } = {}) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  paint(
    canvas,
    Float32Array.from({ length: 128 }, (_, i) => (signed ? (2 * i) / 127 - 1 : (i / 127) * (root ? i / 127 : 1))),
    1,
    128,
    { high: 1, signed, root },
  );
  return el("span", { class: "scale" }, signed ? number(-high, 3) : "0", canvas, number(high, 3));
}

// A small titled map whose cells can be read by pointer and keys; numbers as a table and CSV by `figure`.
// get() returns { values, rows, columns, high, signed }.
function mapFigure(title, get, { note = null, describe = null } = {}) {
  const canvas = el("canvas", {});
  const tell = (r, c) => {
    const map = get(),
      value = map.values[r * map.columns + c];
    const where = describe ? describe(r, c, map) : `row ${r + 1}, column ${c + 1}`;
    return `${where}: ${Number.isNaN(value) ? "cannot be seen" : number(value)}`;
  };
  const grid = () => {
    const map = get();
    return [map.rows, map.columns];
  };
  const body = picture(canvas, { label: title, points: cellPoints(grid, tell) });
  const redraw = () => {
    const map = get();
    paint(canvas, map.values, map.rows, map.columns, map);
    body.redraw({
      text: `${title}, ${map.rows} rows, ${map.columns} columns, largest ${number(map.high)}`,
      shape: map.columns / map.rows,
    });
  };
  redraw();
  const numbers = () => {
    const map = get();
    return {
      header: ["row", "column", "value"],
      rows: Array.from(map.values, (value, i) => [
        Math.floor(i / map.columns) + 1,
        (i % map.columns) + 1,
        Number.isNaN(value) ? null : value,
      ]),
    };
  };
  const node = figure(title, body, { note, numbers });
  node.redraw = () => {
    redraw();
    node.refresh();
  };
  return node;
}
