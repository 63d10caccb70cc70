// Several runs on one page: what came out side by side, in what their configs differ, and their curves together.

start((main, data, arrays) => {
  const runs = data.runs.map((run, i) => withCurves(run, arrays, `${i}/`));
  const header = ["run", "accuracy", "95% from", "to", "set", "steps", "of", "hours", "share in steps", "starts"];
  const rows = runs.map((run) => {
    const total = Object.values(run.seconds).reduce((a, b) => a + b, 0);
    return [
      run.title,
      run.headline?.value ?? null,
      run.headline?.interval?.[0] ?? null,
      run.headline?.interval?.[1] ?? null,
      run.headline?.name ?? "–",
      run.step,
      run.total_steps,
      total / 3600,
      total ? (run.seconds.step ?? 0) / total : null,
      Math.max(1, run.starts.length),
    ];
  });
  const best = runs.filter((run) => run.headline).sort((a, b) => b.headline.value - a.headline.value)[0];
  const differences = ["field", ...runs.map((run) => run.title)];
  main.append(
    topBar(`${runs.length} runs compared`),
    best
      ? el(
          "p",
          { class: "verdict" },
          "Highest accuracy: ",
          el("b", { class: "good" }, nameOf(best.title)),
          `, ${percent(best.headline.value, 2)} (${best.headline.name})`,
          best.headline.interval
            ? `, 95% interval ${percent(best.headline.interval[0], 2)} to ${percent(best.headline.interval[1], 2)}.`
            : ".",
        )
      : "",
    tableFigure("Results", "One row for each run", header, rows),
    bullets(runs.flatMap((run) => run.notes.map((note) => [nameOf(run.title), `: ${note}`]))),
    section(
      "What differs",
      data.differing.length
        ? tableFigure("Fields of the config that differ", "One column for each run", differences, data.differing)
        : el("p", { class: "soft" }, "The configs are the same."),
    ),
    curveSection(runs),
    section(
      "Time",
      el(
        "div",
        { class: "figures" },
        runs.map((run) => el("div", {}, el("h3", {}, nameOf(run.title)), timeBar(run))),
      ),
    ),
    section(
      "Commands",
      runs.map((run) => [el("h3", {}, nameOf(run.title)), commandLine(run.command)]),
    ),
  );
});
