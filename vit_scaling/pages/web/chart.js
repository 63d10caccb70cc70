// A line chart in SVG: hover, zoom, keys, logarithmic or linear axes. One chart, one object.

const DASHES = ["", "6 4", "2 3", "10 3 2 3", "12 5"];
const MARGIN = { left: 54, right: 12, top: 8, bottom: 30 };

// Ticks at 1, 2 or 5 times a power of ten; on a logarithmic axis at powers of ten, or linear where there are too few.
function ticks(low, high, log, count) {
  if (log) {
    const from = Math.floor(Math.log10(low)),
      to = Math.ceil(Math.log10(high));
    const every = Math.max(1, Math.ceil((to - from) / count));
    for (const [stride, steps] of [
      [every, [1]],
      [1, [1]],
      [1, [1, 3]],
      [1, [1, 2, 5]],
    ]) {
      const found = [];
      for (let power = from; power <= to; power += stride) {
        for (const step of steps) {
          const value = step * 10 ** power;
          if (value >= low * 0.9999 && value <= high * 1.0001) found.push(value);
        }
      }
      if (found.length > 2) return found;
    }
  }
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let k = Math.ceil(low / step); k <= high / step + 1e-9 && found.length <= 2 * count; k++)
    found.push(Number((k * step).toPrecision(12)));
  return found;
}

// An exponential moving average, weighted so that its start is no guess; `amount` from 0 (none) to below 1.
function smooth(values, amount) {
  if (!amount) return values;
  let sum = 0,
    weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = amount * sum + (1 - amount) * value;
    weight = amount * weight + (1 - amount);
    return sum / weight;
  });
}

// The sign of a series in a legend.
function keyOf(colour, { dash = 0, points = false } = {}) {
  const sign = points
    ? svg("circle", { cx: 11, cy: 4, r: 3.2 })
    : svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 2.5, "stroke-dasharray": DASHES[dash] });
  return svg("svg", { class: `key s${colour}`, width: 22, height: 8, "aria-hidden": "true" }, sign);
}

function nearest(sorted, target) {
  let low = 0,
    high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < target) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - target) <= Math.abs(sorted[high] - target) ? low : high;
}

// options: { xLabel, yLabel, xLog, yLog, xWhole (ticks at whole numbers), percent, series, marks: [{ x, label }] }; series:
// [{ name, x, y, points, band: [[low], [high]], colour, framed (false: the vertical axis need not hold it) }].
// Returns an element with .set(options), .redraw() and .numbers().
function chart(options) {
  const state = { cursor: null };
  const drawing = svg("svg", { class: "chart", tabindex: 0, role: "application" });
  const frame = el("div", { class: "frame" }, drawing);
  const legend = el("div", { class: "legend", "aria-live": "polite" });
  const node = el("div", {}, frame, legend);
  const box = () => ({ width: drawing.clientWidth || 400, height: drawing.clientHeight || 230 });
  const format = (value) => (options.percent ? percent(value, 2) : number(value));
  let scale = null;
  const fx = (value) => (options.xLog ? Math.log(value) : value);
  const fy = (value) => (options.yLog ? Math.log(value) : value);
  const view = zoomable(frame, {
    area: () => {
      const { left, top, width, height } = drawing.getBoundingClientRect();
      const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
      return { left: left + MARGIN.left, top: top + MARGIN.top, ...inner };
    },
    changed: redraw,
    reading: () => (scale && state.cursor !== null ? scale.point(state.cursor) : null),
    axes: "x",
  });

  const usable = (series) => {
    const points = [];
    for (let i = 0; i < series.x.length; i++) {
      const x = series.x[i],
        y = series.y[i];
      if (x === null || y === null || (options.xLog && x <= 0) || (options.yLog && y <= 0)) continue;
      points.push([x, y, i]);
    }
    return points;
  };

  function limits() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    const all = options.series.map(usable);
    for (const points of all)
      for (const [x] of points) {
        x0 = Math.min(x0, x);
        x1 = Math.max(x1, x);
      }
    if (!(x1 >= x0)) return null;
    if (x1 === x0) x1 = options.xLog ? x0 * 1.01 : x0 + 1;
    const whole = [x0, x1];
    // The value at a share of the whole axis, and the share of a value.
    const back = (share) => {
      if (share === 0 || share === 1) return whole[share];
      const value = fx(whole[0]) + share * (fx(whole[1]) - fx(whole[0]));
      return options.xLog ? Math.exp(value) : value;
    };
    const point = (x) => ({ x: (fx(x) - fx(whole[0])) / (fx(whole[1]) - fx(whole[0])), y: 0.5 });
    [x0, x1] = view.x.map(back);
    all.forEach((points, s) => {
      if (options.series[s].framed === false) return;
      for (const [x, y, i] of points) {
        if (x < x0 || x > x1) continue;
        const band = options.series[s].band;
        const low = band?.[0][i] ?? y,
          high = band?.[1][i] ?? y;
        y0 = Math.min(y0, options.yLog && low <= 0 ? y : low);
        y1 = Math.max(y1, high);
      }
    });
    // What differs by rounding alone is one value: an axis over it would have no ticks that differ.
    const same = (low, high) => high - low <= 1e-7 * Math.max(Math.abs(low), Math.abs(high));
    if (!(y1 >= y0)) [y0, y1] = options.yLog ? [0.1, 1] : [0, 1];
    if (same(y0, y1)) {
      const pad = Math.abs(y0) * 0.1 || 1;
      if (options.yLog) {
        y0 /= 1.1;
        y1 *= 1.1;
      } else {
        y0 -= pad;
        y1 += pad;
      }
    }
    if (!options.yLog) {
      const pad = 0.05 * (y1 - y0);
      y1 += pad;
      y0 -= y0 >= 0 && y0 - pad < 0 ? y0 : pad;
    }
    return { x0, x1, y0, y1, back, point };
  }

  function redraw() {
    const { width, height } = box();
    const range = limits();
    drawing.replaceChildren();
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute(
      "aria-label",
      `${options.label ?? options.yLabel ?? "chart"}: left and right move, plus and minus zoom, 0 shows all`,
    );
    if (!range) {
      scale = null;
      drawing.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no values yet"));
      legend.replaceChildren();
      return;
    }
    const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
    const px = (x) => MARGIN.left + ((fx(x) - fx(range.x0)) / (fx(range.x1) - fx(range.x0))) * inner.w;
    const py = (y) => MARGIN.top + inner.h - ((fy(y) - fy(range.y0)) / (fy(range.y1) - fy(range.y0))) * inner.h;
    scale = { px, back: range.back, point: range.point };

    const clip = `clip${Math.random().toString(36).slice(2)}`;
    drawing.append(
      svg(
        "clipPath",
        { id: clip },
        svg("rect", { x: MARGIN.left - 4, y: 0, width: inner.w + 8, height: height - MARGIN.bottom + 2 }),
      ),
    );
    for (const value of ticks(range.y0, range.y1, options.yLog, Math.max(3, height / 60))) {
      drawing.append(
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: py(value), y2: py(value) }),
        svg(
          "text",
          { x: MARGIN.left - 6, y: py(value) + 4, "text-anchor": "end" },
          options.percent ? `${Number((100 * value).toPrecision(5))}%` : number(value, 3),
        ),
      );
    }
    for (const value of ticks(range.x0, range.x1, options.xLog, Math.max(2, width / 110))) {
      if (options.xWhole && !Number.isInteger(value)) continue;
      drawing.append(
        svg(
          "text",
          { x: px(value), y: height - MARGIN.bottom + 15, "text-anchor": "middle" },
          value >= 1e5 ? Number(value.toPrecision(4)).toExponential().replace("e+", "e") : number(value, 4),
        ),
      );
    }
    drawing.append(svg("text", { x: width - MARGIN.right, y: height - 2, "text-anchor": "end" }, options.xLabel ?? ""));
    const inside = svg("g", { "clip-path": `url(#${clip})` });
    drawing.append(inside);
    for (const mark of options.marks ?? []) {
      if (mark.x < range.x0 || mark.x > range.x1) continue;
      inside.append(
        svg(
          "line",
          { class: "mark", x1: px(mark.x), x2: px(mark.x), y1: MARGIN.top, y2: height - MARGIN.bottom },
          svg("title", {}, mark.label),
        ),
      );
    }
    options.series.forEach((series, s) => {
      const colour = `s${(series.colour ?? s) % 6}`,
        points = usable(series);
      if (series.band) {
        const edge = (which) =>
          points.map(
            ([x, , i]) =>
              `${px(x)},${py(options.yLog ? Math.max(series.band[which][i], 1e-30) : series.band[which][i])}`,
          );
        inside.append(
          svg("polygon", { class: `band ${colour}`, points: [...edge(0), ...edge(1).reverse()].join(" ") }),
        );
      }
      const line = points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
      if (!series.points)
        inside.append(
          svg("polyline", {
            class: `series ${colour}`,
            points: line,
            "stroke-dasharray": DASHES[series.dash ?? Math.floor(s / 6) % 5],
            opacity: series.faint ? 0.3 : null,
          }),
        );
      if (series.points || points.length < 40) {
        for (const [x, y] of points)
          inside.append(
            svg("circle", {
              class: colour,
              cx: px(x),
              cy: py(y),
              r: series.points ? 3.2 : 2.2,
              opacity: series.faint ? 0.4 : null,
            }),
          );
      }
    });
    drawCursor();
  }

  // The legend doubles as the readout: at the cursor it tells the value of each series.
  function drawCursor() {
    drawing.querySelector(".cursor")?.remove();
    if (!scale) return;
    if (state.cursor !== null) {
      const at = scale.px(state.cursor);
      drawing.append(
        svg("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top, y2: box().height - MARGIN.bottom }),
      );
    }
    const keys = options.series
      .filter((series) => !series.faint)
      .map((series) => {
        const s = options.series.indexOf(series);
        const points = usable(series);
        const value =
          state.cursor === null || !points.length
            ? null
            : points[
                nearest(
                  points.map((p) => p[0]),
                  state.cursor,
                )
              ];
        return el(
          "span",
          {},
          keyOf((series.colour ?? s) % 6, { dash: series.dash ?? Math.floor(s / 6) % 5, points: series.points }),
          nameOf(series.name, 40),
          value && el("b", {}, `${format(value[1])}${value[0] === state.cursor ? "" : ` at ${number(value[0])}`}`),
        );
      });
    const marks =
      state.cursor === null
        ? []
        : (options.marks ?? [])
            .filter((mark) => Math.abs(scale.px(mark.x) - scale.px(state.cursor)) < 5)
            .map((mark) => el("span", {}, mark.label));
    legend.replaceChildren(
      ...keys,
      ...(state.cursor === null
        ? []
        : [el("span", { class: "soft" }, `${options.xLabel ?? "x"} ${number(state.cursor, 6)}`)]),
      ...marks,
    );
  }

  const abscissas = () =>
    [...new Set(options.series.flatMap((series) => usable(series).map((p) => p[0])))].sort((a, b) => a - b);
  const moveTo = (x) => {
    const all = abscissas();
    if (all.length) {
      state.cursor = all[nearest(all, x)];
      drawCursor();
    }
  };
  const readPointer = (event) => {
    if (scale) moveTo(scale.back(view.at(event).x));
  };
  frame.addEventListener("pointermove", readPointer);
  frame.addEventListener("pointerdown", readPointer);
  frame.addEventListener("pointerleave", (event) => {
    // A finger that is lifted leaves the value that it pointed at.
    if (event.pointerType !== "touch") {
      state.cursor = null;
      drawCursor();
    }
  });
  drawing.addEventListener("keydown", (event) => {
    const all = abscissas();
    if (!all.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const index = state.cursor === null ? -1 : all.indexOf(state.cursor);
    const go = {
      ArrowRight: Math.min(all.length - 1, index + 1),
      ArrowLeft: Math.max(0, index - 1),
      Home: 0,
      End: all.length - 1,
    }[event.key];
    if (go === undefined) return;
    state.cursor = all[go];
    drawCursor();
    if (scale) view.follow(scale.point(state.cursor));
    event.preventDefault();
  });
  new ResizeObserver(redraw).observe(drawing);

  node.redraw = redraw;
  node.set = (changes) => {
    if (["xLabel", "xLog"].some((name) => name in changes && changes[name] !== options[name])) {
      view.reset();
      state.cursor = null;
    }
    Object.assign(options, changes);
    redraw();
  };
  node.numbers = () => {
    const header = ["series", options.xLabel ?? "x", options.yLabel ?? "y"];
    return {
      header,
      rows: options.series.filter((s) => !s.faint).flatMap((s) => usable(s).map(([x, y]) => [s.name, x, y])),
    };
  };
  return node;
}
