// A scaling study or a table of runs: for a budget, what to train; then the runs, the laws, and how far to trust them.

start((main, data, arrays) => {
  const list = (name) => (arrays[name] ? Array.from(arrays[name]) : null);
  const error = (value) => (data.percent ? percent(value, 2) : number(value, 4));
  const size = (value) => number(value >= 1000 ? Math.round(value) : value, 3);
  const between = (low, high, show) => `${show(low)} to ${show(high)}`;
  const budgets = list("budgets");
  const ends = (name) => [list(`${name}.low`), list(`${name}.high`)];
  // Runs by their size; too many sizes to name are one series.
  const [LABEL, PARAMS, IMAGES, UNIQUE, COMPUTE, ERROR] = [0, 1, 2, 3, 4, 5];
  const sizes = [...new Set(data.sweep.map((run) => run[PARAMS]))].sort((a, b) => a - b);
  const few = sizes.length <= 12;
  const colours = (i) => ({ colour: i % 5, dash: Math.floor(i / 5) }); // the sixth colour is that of the laws
  // As lines, runs on different numbers of images are apart.
  const bySize = (x, points) => {
    const amounts = few && !points ? [...new Set(data.sweep.map((run) => run[UNIQUE]))].sort((a, b) => b - a) : [null];
    return amounts
      .flatMap((amount, dash) =>
        (few ? sizes : [null]).map((params, i) => {
          const own = data.sweep
            .filter((run) => run[x] > 0 && [run[PARAMS], null].includes(params) && [run[UNIQUE], null].includes(amount))
            .sort((a, b) => a[x] - b[x]);
          const name = few ? `${own[0]?.[LABEL]}${amounts.length > 1 ? `, ${number(amount)} images` : ""}` : "runs";
          return { name, x: own.map((r) => r[x]), y: own.map((r) => r[ERROR]), points, colour: i % 5, dash };
        }),
      )
      .filter((each) => each.x.length);
  };

  // ---- The answer, with a slider over budgets.
  function answer() {
    if (!budgets) return el("p", {}, "No run of the sweep has finished yet.");
    const facts = el("div", { "aria-live": "polite", id: "answer" });
    const label = el("b", {});
    const tell = (i) => {
      const most = data.dearest;
      const beyond = budgets[i] > most * 1.0001; // single precision
      label.textContent = `${budgets[i].toExponential(2)} of compute, ${
        beyond
          ? `${number(budgets[i] / most, 3)} times the most expensive run: an extrapolation`
          : "within the runs made"
      }`;
      const one = (title, key, show) =>
        fact(title, show(arrays[key][i]), between(arrays[`${key}.low`][i], arrays[`${key}.high`][i], show));
      const block = (title, parts, notes = []) => [
        el("h3", {}, title),
        el("div", { class: "facts" }, parts),
        bullets(notes),
      ];
      facts.replaceChildren(
        ...data.advice.flatMap(({ key, name, notes }) =>
          block(
            `By the law of ${name}`,
            [
              one("parameters", `${key}.params`, size),
              one("images to train on", `${key}.images`, size),
              one("error", `${key}.error`, error),
            ],
            notes[i],
          ),
        ),
        ...data.laws
          .filter(({ key }) => arrays[key])
          .flatMap(({ key, name }) => block(`By the law of ${name}`, one("error on the frontier", key, error))),
      );
      if (!facts.firstChild) facts.append("The runs determine no law.");
    };
    const first = budgets.findIndex((budget) => budget >= data.dearest * 0.999);
    const slider = el("input", {
      id: "budget",
      type: "range",
      min: 0,
      max: budgets.length - 1,
      step: 1,
      value: first,
      "aria-label": "Budget of compute",
      oninput: (event) => tell(Number(event.target.value)),
    });
    tell(first);
    const level = [...data.advice, ...data.laws][0]?.level;
    return [
      el("div", { class: "bar" }, el("label", { class: "control wide" }, "budget ", slider), label),
      facts,
      level && el("p", { class: "note" }, `Ranges are ${percent(level, 0)} bootstrap intervals of the laws.`),
    ];
  }

  // ---- Figures.
  const curves = [];
  const add = (title, options, note = null) => {
    if (!options.series.length) return;
    const drawn = chart({ label: title, xLog: true, ...options });
    curves.push(figure(title, drawn, { note, numbers: () => drawn.numbers() }));
  };
  const errors = { yLabel: "error", yLog: true, percent: data.percent };
  const lawSeries = data.laws
    .filter(({ key }) => arrays[key])
    .map(({ key, name }, i) => ({
      name: `law of ${name}`,
      x: budgets,
      y: list(key),
      band: ends(key),
      colour: 5,
      dash: i,
    }));
  const frontier = data.frontier.length
    ? [
        {
          name: "frontier",
          x: data.frontier.map((p) => p[0]),
          y: data.frontier.map((p) => p[1]),
          points: true,
          colour: 5,
        },
      ]
    : [];
  add(
    "Error against training compute",
    { ...errors, xLabel: "compute", series: [...bySize(COMPUTE, true), ...frontier, ...lawSeries] },
    lawSeries.length ? "Bands are bootstrap intervals. Beyond the last run the laws extrapolate." : null,
  );
  add("Sample efficiency: error against images seen", {
    ...errors,
    xLabel: "images seen",
    series: bySize(IMAGES, !few),
  });
  if (new Set(data.sweep.map((run) => run[UNIQUE])).size > 1)
    add("Error against different images in the training set", {
      ...errors,
      xLabel: "different images",
      series: bySize(UNIQUE, true),
    });
  for (const [quantity, title] of [
    ["params", "Best size for a budget"],
    ["images", "Images seen for a budget"],
  ])
    add(title, {
      xLabel: "compute",
      yLabel: quantity,
      yLog: true,
      series: data.advice.map(({ key, name }) => ({
        name: `law of ${name.split(",")[0]}`,
        x: budgets,
        y: list(`${key}.${quantity}`),
        band: ends(`${key}.${quantity}`),
      })),
    });
  for (const law of new Set(data.residuals.map((row) => row[0]))) {
    const own = data.residuals.filter((row) => row[0] === law);
    const labels = few ? [...new Set(own.map((row) => row[2]))] : ["runs"];
    const series = labels.map((name, i) => {
      const rows = own.filter((row) => !few || row[2] === name);
      return { name, x: rows.map((row) => row[3]), y: rows.map((row) => row[6]), points: true, ...colours(i) };
    });
    const rms = Math.sqrt(own.reduce((sum, row) => sum + row[6] ** 2, 0) / own.length);
    add(
      `Residuals of the law of ${law}`,
      { xLabel: "compute", yLabel: "measured over fitted, less 1", percent: true, series },
      `Measured over fitted error, less 1; root mean square ${percent(rms, 2)} over ${own.length} runs.`,
    );
  }
  const left = data.rainbow.filter((row) => row.curve);
  if (left.length)
    add("The law of compute with one size left out each", {
      ...errors,
      xLabel: "compute",
      series: [
        ...left.map((row, i) => ({
          name: `without ${size(row.left_out)}`,
          x: budgets,
          y: list(row.curve),
          framed: false,
          ...colours(i),
        })),
        ...lawSeries.slice(0, 1).map((series) => ({ ...series, name: "all runs", band: null, framed: true })),
      ],
    });

  // ---- Tables.
  const law = ({ name, form, level, coefficients }) =>
    tableFigure(`Law of ${name}`, form, ["coefficient", "value", `${percent(level, 0)} from`, "to"], coefficients);
  const more = data.more_data.map(([unique, ...rest]) => [unique ?? "unlimited", ...rest]);
  main.append(
    topBar(nameOf(data.title)),
    el(
      "p",
      { class: "verdict" },
      data.unfinished.length
        ? el("b", { class: "bad" }, `${data.unfinished.length} runs have not finished.`)
        : el("b", { class: "good" }, "All listed runs finished."),
      ` ${data.runs.rows.length} runs in the table.`,
    ),
    section("For a budget, train this", answer()),
    section(
      "What the runs do not determine",
      data.problems.length ? bullets(data.problems) : el("p", { class: "soft" }, "No warning."),
    ),
    section("Curves", el("p", { class: "note" }, PLOT_HELP), el("div", { class: "figures" }, curves)),
    data.laws.length ? section("The laws", data.laws.map(law)) : "",
    more.length
      ? section(
          "What more different images would give",
          tableFigure(
            "Value of different images",
            "By the law of repeated data, for the compute of the most expensive run. Worth: the compute that reaches the same error on the images at hand, over this compute; – where none does.",
            ["different images", "best size", "from", "to", "error", "from", "to", "worth"],
            more,
          ),
        )
      : "",
    data.held_out.length || data.rainbow.length
      ? section(
          "How far to trust it",
          data.held_out.length
            ? tableFigure(
                "The most expensive runs, predicted from the others",
                "Miss: root mean square of log predicted less log measured error. The law of compute is judged on the frontier.",
                ["law of", "runs fitted", "runs judged", "miss"],
                data.held_out,
              )
            : "",
          data.rainbow.length
            ? tableFigure(
                "One size left out each",
                "Answers for the compute of the most expensive run; – is not determined",
                ["parameters left out", "best size", "error on the frontier"],
                data.rainbow.map((row) => [row.left_out, row.size, row.error]),
              )
            : "",
        )
      : "",
    data.checklist.length
      ? section(
          "How this was fitted",
          tableFigure("Checklist", "Question and answer", ["question", "answer"], data.checklist),
        )
      : "",
    data.unfinished.length
      ? section(
          "Runs that have not finished",
          tableFigure("Run and reason", "One row for each run", ["run", "why"], data.unfinished),
        )
      : "",
    data.runs.rows.length
      ? section("All runs", tableFigure("Table of runs", "One row for each run", data.runs.header, data.runs.rows))
      : "",
  );
});
