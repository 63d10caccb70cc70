// What is one family's own: filters, bias tables, terms of local attention, Gaussian heads; and mean distances of all.

function filterPanel(data, arrays) {
  const filters = arrays.filters;
  if (!filters) return null;
  const [count, h, w] = filters.shape;
  const readout = el("div", { class: "note", "aria-live": "polite" }, "\u00a0");
  const tiles = Array.from({ length: count }, (_, f) => {
    const canvas = el("canvas", { width: w, height: h });
    const pixels = canvas.getContext("2d").createImageData(w, h);
    for (let i = 0; i < h * w; i++)
      for (let c = 0; c < 4; c++) pixels.data[4 * i + c] = c < 3 ? filters[(f * h * w + i) * 3 + c] : 255;
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    const tell = (r, c) => {
      const at = ((f * h + r) * w + c) * 3;
      const [red, green, blue] = filters.subarray(at, at + 3);
      return `component ${f + 1}, row ${r + 1}, column ${c + 1}: red ${red}, green ${green}, blue ${blue}`;
    };
    const points = cellPoints(() => [h, w], tell);
    return picture(canvas, { label: `Principal component ${f + 1}`, points, ratio: w / h, readout });
  });
  const numbers = () => ({
    header: ["component", "row", "column", "red", "green", "blue"],
    rows: Array.from({ length: count * h * w }, (_, i) => [
      Math.floor(i / (h * w)) + 1,
      Math.floor((i % (h * w)) / w) + 1,
      (i % w) + 1,
      ...[0, 1, 2].map((c) => filters[3 * i + c]),
    ]),
  });
  return section(
    "Patch embedding",
    figure(`Its first ${count} principal components`, el("div", {}, el("div", { class: "tiles" }, tiles), readout), {
      wide: true,
      numbers,
      note: "Each is scaled to its own range; grey is zero.",
    }),
  );
}

function distancePanel(look) {
  const heads = Math.max(...look.layers.map((layer) => layer.distances.length));
  const series = Array.from({ length: heads }, (_, n) => {
    const own = look.layers.map((layer, z) => [z + 1, layer.distances[n]]).filter(([, d]) => d !== undefined);
    return { name: `head ${n + 1}`, x: own.map((p) => p[0]), y: own.map((p) => p[1]), points: true };
  });
  const mean = look.layers.map((layer) => layer.distances.reduce((a, b) => a + b, 0) / layer.distances.length);
  series.push({ name: "mean of the heads", x: mean.map((_, z) => z + 1), y: mean, colour: 5, dash: 0 });
  const drawn = chart({ label: "Mean attention distance", xLabel: "layer", xWhole: true, yLabel: "pixels", series });
  return section(
    "Mean attention distance",
    figure("By layer and head, in pixels of the input", drawn, {
      wide: true,
      numbers: () => drawn.numbers(),
      note: "The mean over all queries and the images shown of the distance between query and key, weighted by attention.",
    }),
  );
}

// Bias tables of the chosen layer: one picture for each head, offset zero in the middle.
function biasPanel(look, arrays, state) {
  if (!look.layers.some((layer) => layer.table)) return null;
  const place = el("div", { class: "panels" });
  const title = el("p", { class: "note" });
  let shown = -1;
  const update = () => {
    const layer = look.layers[state.layer];
    if (shown === state.layer || !layer.table) return;
    shown = state.layer;
    const table = arrays[layer.table],
      [heads, rows, columns] = table.shape;
    title.textContent = `${layer.name}: the bias added to the logit by offset, query minus key, offset zero in the middle. Blue is negative, orange positive.`;
    place.replaceChildren(
      ...Array.from({ length: heads }, (_, n) => {
        const values = table.subarray(n * rows * columns, (n + 1) * rows * columns);
        return mapFigure(`Head ${n + 1}`, () => ({ values, rows, columns, high: largest(values), signed: true }), {
          describe: (r, c) => `rows ${r - (rows - 1) / 2}, columns ${c - (columns - 1) / 2}`,
          note: `largest ${number(largest(values), 3)}`,
        });
      }),
    );
  };
  return { node: section("Position bias of the chosen layer", title, place), update };
}

// The k x k neighbourhood of the query in the chosen layer and head: weights, and the two terms that they are made of.
function termsPanel(look, state) {
  if (!look.layers.some((layer) => Object.keys(layer.terms).length)) return null;
  const current = () => look.layers[state.layer];
  const get = (name) => () => {
    const layer = current(),
      k = Math.round(Math.sqrt(layer.entries));
    if (!Object.keys(layer.terms).length) return { values: new Float32Array(1), rows: 1, columns: 1, high: 0 };
    const about = name === "weights" ? layer.weights : layer.terms[name];
    const values = layer.local(about, state.image, state.head, state.query(layer));
    return {
      values,
      rows: k,
      columns: k,
      high: largest(values.filter((v) => !Number.isNaN(v))),
      signed: name !== "weights",
    };
  };
  const describe = (r, c, map) => `offset ${r - (map.rows - 1) / 2}, ${c - (map.columns - 1) / 2}`;
  const figures = [
    ["weights", "Attention"],
    ["content", "Content, q·k"],
    ["position", "Position, q·r"],
  ].map(([name, title]) => mapFigure(title, get(name), { describe }));
  return {
    node: section(
      "The neighbourhood of the query",
      el(
        "p",
        { class: "note" },
        "Logits less their mean over the neighbours in the image; neighbours outside it cannot be seen and stay empty.",
      ),
      el("div", { class: "panels" }, figures),
    ),
    update: () => figures.forEach((node) => node.redraw()),
  };
}

// Centers and spreads of Gaussian heads as contours around the query, and how they moved over checkpoints.
function gaussianPanel(data, arrays) {
  const { centers, covariances } = arrays;
  if (!centers) return null;
  const [times, depth, heads] = centers.shape;
  const at = (t, z, n) => {
    const i = (t * depth + z) * heads + n;
    return { center: [centers[2 * i], centers[2 * i + 1]], covariance: covariances.subarray(4 * i, 4 * i + 4) };
  };
  let reach = 3;
  for (const value of centers) reach = Math.max(reach, Math.min(60, Math.abs(value) + 2));
  const svgs = Array.from({ length: depth }, (_, z) =>
    svg("svg", {
      viewBox: `${-reach} ${-reach} ${2 * reach} ${2 * reach}`,
      class: "gaussians",
    }),
  );
  const label = el("span", { class: "note", "aria-live": "polite" });
  let t = times - 1;
  // The points of a layer's picture are its heads: each is the square around its inner contour.
  const share = (offset) => (offset + reach) / (2 * reach);
  const pictures = svgs.map((node, z) =>
    picture(node, {
      label: `Layer ${z + 1}, centers of ${heads} heads`,
      points: {
        first: 0,
        pick: ({ x, y }) => {
          const away = Array.from({ length: heads }, (_, n) => {
            const [r, c] = at(t, z, n).center;
            return Math.hypot(share(c) - x, share(r) - y);
          });
          return away.indexOf(Math.min(...away));
        },
        move: (n, down, right) => clamp(n + down + right, 0, heads - 1),
        place: (n) => {
          const { center, covariance } = at(t, z, n);
          const [h, w] = [covariance[0], covariance[3]].map((variance) => Math.sqrt(variance) / reach);
          return { x: share(center[1]) - w / 2, y: share(center[0]) - h / 2, width: w, height: h };
        },
        tell: (n) => {
          const { center, covariance } = at(t, z, n);
          const spread = [covariance[0], covariance[3]].map((variance) => number(Math.sqrt(variance), 3));
          return `head ${n + 1}: row ${number(center[0], 3)}, column ${number(center[1], 3)}, deviations ${spread.join(" and ")}`;
        },
      },
    }),
  );
  function draw() {
    label.textContent = data.steps.length ? `step ${data.steps[t].toLocaleString("en-US")}` : "";
    svgs.forEach((node, z) => {
      node.replaceChildren(
        svg("line", { class: "axis", x1: -reach, x2: reach, y1: 0, y2: 0, "stroke-width": reach / 150 }),
        svg("line", { class: "axis", x1: 0, x2: 0, y1: -reach, y2: reach, "stroke-width": reach / 150 }),
      );
      for (let n = 0; n < heads; n++) {
        const { center, covariance } = at(t, z, n),
          colour = `s${n % 6}`;
        // Semi-axes of the ellipse from the eigenvalues of the 2 x 2 covariance; rows are y, columns are x.
        const [a, b, d] = [covariance[3], covariance[1], covariance[0]];
        const middle = (a + d) / 2,
          root = Math.sqrt(((a - d) / 2) ** 2 + b * b);
        const angle = (Math.atan2(2 * b, a - d) / 2) * (180 / Math.PI);
        // Within sqrt(-2 ln(1 - p)) standard deviations lies the share p of a two-dimensional Gaussian.
        for (const [share, opacity] of [
          [0.4, 0.95],
          [0.9, 0.35],
        ]) {
          const s = Math.sqrt(-2 * Math.log(1 - share));
          node.append(
            svg(
              "ellipse",
              {
                class: colour,
                cx: center[1],
                cy: center[0],
                rx: s * Math.sqrt(middle + root),
                ry: s * Math.sqrt(Math.max(middle - root, 0)),
                transform: `rotate(${angle} ${center[1]} ${center[0]})`,
                fill: "none",
                "fill-opacity": 0,
                "stroke-opacity": opacity,
                "stroke-width": reach / 70,
              },
              svg("title", {}, `head ${n + 1}: center row ${number(center[0], 3)}, column ${number(center[1], 3)}`),
            ),
          );
        }
        if (times > 1) {
          const path = Array.from({ length: times }, (_, u) => at(u, z, n).center)
            .map(([r, c]) => `${c},${r}`)
            .join(" ");
          node.append(
            svg("polyline", {
              class: colour,
              points: path,
              fill: "none",
              "fill-opacity": 0,
              "stroke-opacity": 0.7,
              "stroke-width": reach / 130,
            }),
          );
        }
      }
      node.append(
        svg("rect", {
          x: -0.5,
          y: -0.5,
          width: 1,
          height: 1,
          fill: "none",
          stroke: "currentColor",
          "stroke-width": reach / 90,
        }),
      );
      pictures[z].redraw();
    });
  }
  draw();
  const slider =
    times > 1 &&
    el(
      "label",
      { class: "control" },
      "checkpoint ",
      el("input", {
        type: "range",
        min: 0,
        max: times - 1,
        value: t,
        step: 1,
        "aria-label": "Checkpoint",
        id: "checkpoint",
        oninput: (event) => {
          t = Number(event.target.value);
          draw();
        },
      }),
      label,
    );
  const numbers = () => ({
    header: [
      "step",
      "layer",
      "head",
      "row of center",
      "column of center",
      "variance of rows",
      "covariance",
      "variance of columns",
    ],
    rows: Array.from({ length: times * depth * heads }, (_, i) => {
      const { center, covariance } = at(Math.floor(i / (depth * heads)), Math.floor(i / heads) % depth, i % heads);
      return [
        data.steps[Math.floor(i / (depth * heads))] ?? null,
        (Math.floor(i / heads) % depth) + 1,
        (i % heads) + 1,
        ...center,
        covariance[0],
        covariance[1],
        covariance[3],
      ];
    }),
  });
  const note = `The square is the query. Of each head the contours hold 40% and 90% of its Gaussian${times > 1 ? "; thin lines are the paths of the centers over the checkpoints" : ""}. Units are cells of the map.`;
  return section(
    "Where Gaussian heads look",
    el("div", { class: "bar" }, slider || ""),
    figure(
      "Centers and spreads by layer",
      el(
        "div",
        { class: "gaussian-row" },
        pictures.map((node, z) => el("div", {}, el("h3", {}, `Layer ${z + 1}`), node)),
      ),
      { wide: true, numbers, note },
    ),
  );
}
