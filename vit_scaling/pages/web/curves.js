// The curves of one run or of several: what belongs together shares a chart, and one bar sets all axes.

// Each metric goes to the first group whose pattern it matches; the rest get a chart of their own, so that none is lost.
const GROUPS = [
  { title: "Loss", pattern: /(^|\/)loss$/, smoothable: /^loss$/, log: true },
  { title: "Accuracy", pattern: /\/accuracy$/, percent: true },
  { title: "Few-shot accuracy", pattern: /shot$/, percent: true },
  { title: "Learning rate", pattern: /^learning_rate$/ },
  { title: "Gradient and update norms", pattern: /^(gradient|update)_norm$/, smoothable: /./, log: true },
  { title: "Parameter norm", pattern: /^parameter_norm$/ },
  { title: "Images per second per device", pattern: /^images_per_second_per_device$/, smoothable: /./ },
  { title: "FLOPs per second per device", pattern: /^flops_per_second_per_device$/, smoothable: /./ },
  { title: "MFU", pattern: /^mfu$/, smoothable: /./, percent: true },
  { title: "Waiting for data, and goodput", pattern: /^(data_wait_share|useful_share|goodput)$/, percent: true },
  { title: "Seconds per step", pattern: /^step_seconds$/, smoothable: /./, log: true },
  { title: "Skipped updates", pattern: /^skipped$/ },
  { title: "Irregular training images, counted in each start", pattern: /^data\// },
];
const UNSEEN = /^(examples|epoch)$|_std$/; // axes, and the deviations that are drawn as bands

// Linear interpolation between the known (step, seconds).
function secondsAt(run, step) {
  const { steps, seconds } = run.clock;
  if (steps.length < 2) return null;
  let i = nearest(steps, step);
  if (steps[i] > step && i > 0) i--;
  if (i >= steps.length - 1) return seconds.at(-1);
  return seconds[i] + ((step - steps[i]) / (steps[i + 1] - steps[i])) * (seconds[i + 1] - seconds[i]);
}

function withCurves(data, arrays, prefix = "") {
  const curves = {};
  for (const { name, steps, values } of data.curves) {
    curves[name] = {
      steps: Array.from(arrays[steps]),
      values: Array.from(arrays[values], (v) => (Number.isFinite(v) ? v : null)),
    };
  }
  return {
    ...data,
    curves,
    clock: { steps: Array.from(arrays[`${prefix}clock.steps`]), seconds: Array.from(arrays[`${prefix}clock.seconds`]) },
  };
}

// runs: made by withCurves, each with a title where there are several.
function curveSection(runs) {
  const axes = {
    step: { label: "step", of: (run, step) => step },
    images: { label: "images seen", of: (run, step) => step * run.batch_size },
    seconds: { label: "seconds of training", of: secondsAt },
  };
  const state = { axis: "step", smoothing: 0, scale: "auto", xScale: "linear" };
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => !UNSEEN.test(name));
  const groups = GROUPS.map((group) => ({ ...group, names: [] }));
  for (const name of names) {
    const group = groups.find((each) => each.pattern.test(name));
    if (group) group.names.push(name);
    else groups.push({ title: name, pattern: /^$/, names: [name], smoothable: /./ });
  }
  const several = runs.length > 1;

  function seriesOf(group) {
    return runs.flatMap((run, r) =>
      group.names
        .map((name, n) => [name, n])
        .filter(([name]) => run.curves[name])
        .flatMap(([name, n]) => {
          const { steps, values } = run.curves[name];
          const x = steps.map((step) => axes[state.axis].of(run, step));
          const label = several ? (group.names.length > 1 ? `${run.title} ${name}` : run.title) : name;
          const look = several ? { colour: r, dash: n % 5 } : {};
          const deviation = run.curves[`${name}_std`];
          const band = deviation && [
            values.map((v, i) => (v === null ? v : v - deviation.values[i])),
            values.map((v, i) => (v === null ? v : v + deviation.values[i])),
          ];
          const smoothed = state.smoothing && group.smoothable?.test(name);
          const line = { name: label, x, y: smoothed ? smooth(values, state.smoothing) : values, ...look, band };
          return smoothed ? [line, { ...line, y: values, faint: true, band: null }] : [line];
        }),
    );
  }

  // In one run a faint raw curve must share the colour of its smoothed one.
  function coloured(series) {
    if (several) return series;
    let colour = -1;
    return series.map((each) => {
      if (!each.faint) colour++;
      return { ...each, colour: colour % 6, dash: Math.floor(colour / 6) % 5 };
    });
  }

  const marks = () =>
    runs.flatMap((run) =>
      (run.starts ?? []).slice(1).map((start, i) => ({
        x: axes[state.axis].of(run, start.step),
        label: `${several ? run.title + ": " : ""}restart ${i + 1} at step ${start.step}`,
      })),
    );
  const shown = groups
    .filter((group) => group.names.length)
    .map((group) => {
      const drawn = chart({
        label: group.title,
        yLabel: group.title,
        percent: group.percent,
        series: [],
        xLabel: "step",
      });
      drawn.update = () =>
        drawn.set({
          series: coloured(seriesOf(group)),
          marks: marks(),
          xLabel: axes[state.axis].label,
          xLog: state.xScale === "log",
          yLog: state.scale === "auto" ? Boolean(group.log) && !group.percent : state.scale === "log",
        });
      return { drawn, node: figure(group.title, drawn, { numbers: () => drawn.numbers() }) };
    });
  const update = () =>
    shown.forEach(({ drawn, node }) => {
      drawn.update();
      node.refresh();
    });
  const control = (text, label, key, values) =>
    el(
      "span",
      { class: "control" },
      text,
      choice(
        label,
        values.map((value) => [value, value]),
        state[key],
        (value) => {
          state[key] = value;
          update();
        },
      ),
    );
  const amount = el("input", {
    type: "range",
    min: 0,
    max: 0.99,
    step: 0.01,
    value: 0,
    "aria-label": "Smoothing",
    oninput: (event) => {
      state.smoothing = Number(event.target.value);
      update();
    },
  });
  update();
  return el(
    "section",
    { "aria-label": "Curves" },
    el("h2", {}, "Curves"),
    el(
      "div",
      { class: "bar sticky" },
      control("by ", "Horizontal axis", "axis", ["step", "images", "seconds"]),
      control("x ", "Horizontal scale", "xScale", ["linear", "log"]),
      control("y ", "Vertical scale", "scale", ["auto", "linear", "log"]),
      el("label", { class: "control" }, "smoothing ", amount),
    ),
    el("p", { class: "note" }, `${PLOT_HELP} Dashed verticals are restarts.`),
    el(
      "div",
      { class: "figures" },
      shown.map(({ node }) => node),
    ),
  );
}

// Where the time went, over all restarts.
function timeBar(run) {
  const parts = Object.entries(run.seconds)
    .filter(([, seconds]) => seconds > 0)
    .sort((a, b) => b[1] - a[1]);
  const total = parts.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (!total) return el("p", { class: "soft" }, "No time has been noted yet.");
  const bar = el(
    "div",
    { class: "stack" },
    parts.map(([, seconds], i) => {
      const part = el("div", {});
      part.style.width = `${(100 * seconds) / total}%`;
      part.style.background = `var(--s${i % 6})`;
      return part;
    }),
  );
  const ends = parts.map((_, i) => parts.slice(0, i + 1).reduce((sum, [, seconds]) => sum + seconds, 0) / total);
  const body = picture(bar, {
    label: `Time of ${parts.length} parts`,
    axes: "x",
    points: {
      first: 0,
      pick: ({ x }) =>
        clamp(
          ends.findIndex((end) => x < end),
          0,
          parts.length - 1,
        ),
      move: (i, down, right) => clamp(i + down + right, 0, parts.length - 1),
      place: (i) => ({ x: ends[i - 1] ?? 0, y: 0, width: parts[i][1] / total, height: 1 }),
      tell: (i) => `${parts[i][0]}: ${duration(parts[i][1])}, ${percent(parts[i][1] / total)}`,
    },
  });
  const legend = el(
    "div",
    { class: "legend" },
    parts.map(([name, seconds], i) =>
      el("span", {}, keyOf(i % 6), name, el("b", {}, `${duration(seconds)} (${percent(seconds / total)})`)),
    ),
  );
  const numbers = () => ({
    header: ["part", "seconds", "share"],
    rows: parts.map(([name, seconds]) => [name, seconds, seconds / total]),
  });
  return figure("Where the time went", el("div", {}, body, legend), {
    numbers,
    wide: true,
    note: "Over all restarts. “lost” is time that a crash undid.",
  });
}
