// A scaling study: for a budget, what to train; then the runs, the law with its band, and what it rests on.

start((main, data, arrays) => {
  const list = (name) => (arrays[name] ? Array.from(arrays[name]) : null);
  const budgets = list("budgets"),
    law = list("law");
  const sweep = data.runs.filter((run) => run.group === "sweep");
  const sizes = [...new Set(sweep.map((run) => run.size))].sort((a, b) => a - b);
  const span = (name, i, show) => `${show(list(`${name}.low`)[i])} to ${show(list(`${name}.high`)[i])}`;
  const pct = (value) => percent(value, 2);

  // ---- The answer, with a slider over budgets.
  function answer() {
    if (!budgets) return el("p", {}, "No run of the sweep has finished yet.");
    const facts = el("div", { class: "facts", "aria-live": "polite", id: "answer" });
    const label = el("b", {});
    const tell = (i) => {
      label.textContent = `${budgets[i].toExponential(2)} FLOPs`;
      const beyond =
        budgets[i] > data.dearest * 1.0001
          ? `${number(budgets[i] / data.dearest, 3)} times the dearest run: an extrapolation`
          : "within the runs made";
      const rows = [];
      if (arrays["best.params"]) {
        rows.push(
          fact(
            "parameters",
            number(Math.round(list("best.params")[i]), 3),
            span("best.params", i, (v) => number(v, 3)),
          ),
          fact(
            "images to train on",
            number(Math.round(list("best.images")[i]), 3),
            span("best.images", i, (v) => number(v, 3)),
          ),
          fact("error, from size and images", pct(list("best.error")[i]), span("best.error", i, pct)),
        );
      }
      if (law) rows.push(fact("error, from the frontier", pct(law[i]), span("law", i, pct)));
      facts.replaceChildren(...rows, fact("budget", budgets[i].toExponential(1), beyond));
    };
    const first = budgets.findIndex((budget) => budget >= data.dearest * 0.999);
    const slider = el("input", {
      id: "budget",
      type: "range",
      min: 0,
      max: budgets.length - 1,
      step: 1,
      value: first,
      "aria-label": "Budget in training FLOPs",
      oninput: (event) => tell(Number(event.target.value)),
    });
    slider.style.width = "min(100%, 520px)";
    tell(first);
    return [el("div", { class: "bar" }, el("label", { class: "control" }, "budget ", slider), label), facts];
  }

  const bySize = (x, y) =>
    sizes.map((size, s) => {
      const own = sweep.filter((run) => run.size === size).sort((a, b) => a[x] - b[x]);
      return {
        name: `size ${size}`,
        x: own.map((run) => run[x]),
        y: own.map((run) => run[y]),
        colour: s % 5,
        dash: Math.floor(s / 5),
      };
    });
  const curves = [];
  const add = (title, options, note) => {
    const drawn = chart({ label: title, ...options });
    curves.push(figure(title, drawn, { note, numbers: () => drawn.numbers() }));
  };
  if (sweep.length) {
    const fitted = law
      ? [{ name: "law", x: budgets, y: law, band: [list("law.low"), list("law.high")], colour: 5 }]
      : [];
    const points = bySize("compute", "error").map((series) => ({ ...series, points: true }));
    const frontier = data.law
      ? [
          {
            name: "frontier",
            x: data.law.frontier.map((p) => p[0]),
            y: data.law.frontier.map((p) => p[1]),
            points: true,
            colour: 5,
          },
        ]
      : [];
    add(
      "Error against training compute",
      {
        xLabel: "FLOPs",
        yLabel: "error",
        xLog: true,
        yLog: true,
        percent: true,
        series: [...points, ...frontier, ...fitted],
      },
      data.law
        ? `E = c + a (C + d)^-b; the band is the ${percent(data.law.level, 0)} bootstrap interval. Beyond the last point it extrapolates.`
        : null,
    );
    add("Sample efficiency: error against images seen", {
      xLabel: "images",
      yLabel: "error",
      xLog: true,
      yLog: true,
      percent: true,
      series: bySize("images", "error"),
    });
    add("Error against different images in the training set", {
      xLabel: "different images",
      yLabel: "error",
      xLog: true,
      yLog: true,
      percent: true,
      series: bySize("data_images", "error").map((series) => ({ ...series, points: true })),
    });
    if (data.law)
      add(
        "Residuals of the law",
        {
          xLabel: "FLOPs",
          yLabel: "residual",
          xLog: true,
          percent: true,
          series: [
            {
              name: "frontier point less law",
              x: data.law.frontier.map((p) => p[0]),
              y: data.law.frontier.map((p) => p[2]),
              points: true,
            },
          ],
        },
        data.law && `Root mean square ${percent(data.law.rms, 2)}, R² ${number(data.law.r_squared)}.`,
      );
    if (arrays["best.params"]) {
      for (const [name, title] of [
        ["params", "Best size for a budget"],
        ["images", "Images for a budget"],
      ]) {
        add(title, {
          xLabel: "FLOPs",
          yLabel: name,
          xLog: true,
          yLog: true,
          series: [
            {
              name: title,
              x: budgets,
              y: list(`best.${name}`),
              band: [list(`best.${name}.low`), list(`best.${name}.high`)],
            },
          ],
        });
      }
    }
  }
  const header = data.runs.length ? Object.keys(data.runs[0]) : [];
  const rows = data.runs.map((run) => header.map((name) => run[name]));
  const coefficients = data.law ? Object.entries(data.law.coefficients).map(([name, values]) => [name, ...values]) : [];
  main.append(
    el("header", { class: "top" }, el("h1", {}, nameOf(data.title)), el("span", { class: "spring" }), themeSwitch()),
    el(
      "p",
      { class: "verdict" },
      data.unfinished.length
        ? el("b", { class: "bad" }, `${data.unfinished.length} runs have not finished.`)
        : el("b", { class: "good" }, "All listed runs finished."),
      ` ${data.runs.length} runs in the table.`,
    ),
    section("For a budget, train this", answer()),
    section(
      "What the runs do not determine",
      data.problems.length
        ? el(
            "ul",
            { class: "plain" },
            data.problems.map((text) => el("li", {}, text)),
          )
        : el("p", { class: "soft" }, "No warning."),
    ),
    section(
      "Curves",
      el(
        "p",
        { class: "note" },
        "Drag to zoom, double-click to see all. With a chart in focus: arrow keys read values, + and − zoom, 0 shows all.",
      ),
      el("div", { class: "figures" }, curves),
    ),
    coefficients.length
      ? section(
          "The law",
          figure(
            "E = c + a (C + d)^-b",
            table("Coefficients with their intervals", ["coefficient", "value", "from", "to"], coefficients),
            { wide: true, numbers: () => ({ header: ["coefficient", "value", "from", "to"], rows: coefficients }) },
          ),
        )
      : "",
    data.unfinished.length
      ? section("Runs that have not finished", table("Run and reason", ["run", "why"], data.unfinished))
      : "",
    rows.length
      ? section(
          "All runs",
          figure("Table of runs", table("One row for each finished run", header, rows), {
            wide: true,
            numbers: () => ({ header, rows }),
          }),
        )
      : "",
  );
});
