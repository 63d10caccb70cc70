// The report of one run: first whether it worked, then everything that it is made of.

function firstScreen(run) {
  const total = Object.values(run.seconds).reduce((a, b) => a + b, 0);
  const head = run.headline;
  const verdict = run.finished
    ? el(
        "p",
        { class: "verdict" },
        el("b", { class: "good" }, "Finished."),
        ` ${number(run.total_steps)} steps of ${number(run.batch_size)} images.`,
      )
    : el(
        "p",
        { class: "verdict" },
        el("b", { class: "bad" }, "Not finished."),
        ` Step ${number(run.step)} of ${number(run.total_steps)}.`,
      );
  const facts = el(
    "div",
    { class: "facts" },
    head
      ? fact(
          head.name.replace("/", " "),
          percent(head.value, 2),
          head.interval
            ? `95% interval ${percent(head.interval[0], 2)} to ${percent(head.interval[1], 2)}, ${number(head.examples)} images, step ${number(head.step)}`
            : `step ${number(head.step)}`,
        )
      : fact("accuracy", "–", "nothing was evaluated yet"),
    fact("time", duration(total), run.seconds.step ? `${percent(run.seconds.step / total)} of it in steps` : null),
    fact(
      "images seen",
      number(run.step * run.batch_size),
      `${percent(run.total_steps ? run.step / run.total_steps : null, 0)} of the planned steps`,
    ),
    fact("devices", number(run.environment.device_count ?? null), run.environment.device_kind ?? null),
    fact(
      "starts",
      number(Math.max(1, run.starts.length)),
      run.starts.length > 1
        ? `restarted at step ${run.starts
            .slice(1)
            .map((s) => s.step)
            .join(", ")}`
        : "no restart",
    ),
  );
  return [
    verdict,
    facts,
    run.notes.length > 0 && bullets(run.notes),
    el("h3", {}, "The same run again"),
    commandLine(run.command),
  ];
}

function evaluationSection(evaluation) {
  if (!evaluation) return section("Evaluation", el("p", { class: "soft" }, "No set was classified."));
  const about = el(
    "p",
    { class: "note" },
    `The ${evaluation.set} set at step ${number(evaluation.step)}.${evaluation.left_out ? ` ${evaluation.left_out}.` : ""}`,
  );
  if (!evaluation.classes) return section("Evaluation", about);
  const header = ["class", "images", "right", "accuracy", "predicted"];
  const left = evaluation.classes_left_out
    ? ` ${evaluation.classes_left_out} classes with higher accuracy are left out.`
    : "";
  return section(
    "Evaluation",
    about,
    tableFigure(
      "Classes, least accurate first",
      `${evaluation.images - evaluation.wrong} of ${evaluation.images} images right.${left}`,
      header,
      evaluation.classes,
    ),
    el(
      "h3",
      {},
      evaluation.confusions.length
        ? `Most frequent confusions (${evaluation.confusions.length} of ${evaluation.pairs} pairs)`
        : "No image was confused.",
    ),
    el(
      "div",
      { class: "tiles" },
      evaluation.confusions.map((each) =>
        el(
          "div",
          {},
          el("img", { src: each.image, alt: "an image that was confused" }),
          nameOf(each.label, 24),
          el("div", { class: "bad" }, "taken for ", nameOf(each.prediction, 24)),
          el("div", { class: "soft" }, each.count > 1 ? `${each.count} times` : "once"),
        ),
      ),
    ),
  );
}

// What was logged as a warning or an error, over all starts.
function warningSection(run) {
  const header = ["level", "text", "how often"];
  if (!run.warnings.length) return section("Warnings", el("p", { class: "soft" }, "No warning was logged."));
  const title = `${run.warnings.length} different warnings`;
  return section("Warnings", tableFigure(title, "Of the first process, over all starts", header, run.warnings));
}

function configSection(run) {
  const changed = new Set(run.overridden);
  const rows = run.config.map(([name, value]) => [name, value, changed.has(name) ? "overridden" : ""]);
  return section(
    "Config",
    el(
      "p",
      { class: "note" },
      changed.size
        ? `Overridden on the command line, and marked: ${changed.size} of ${run.config.length} fields.`
        : "No field was overridden on the command line.",
    ),
    tableFigure("All fields", "Resolved config, durations in steps", ["field", "value", "origin"], rows, {
      changed: (row) => row[2] !== "",
    }),
  );
}

function parameterSection(run) {
  if (!run.parameters) return null;
  const header = [
    "parameter",
    "shape",
    "count",
    "weight decay",
    "learning-rate scale",
    "sharded over",
    "bytes per device",
  ];
  const count = run.parameters.reduce((sum, row) => sum + row[2], 0);
  return section(
    "Parameters",
    tableFigure(
      `${count.toLocaleString("en-US")} parameters`,
      "Every parameter, its rules and its sharding",
      header,
      run.parameters,
    ),
  );
}

function environmentSection(run) {
  const starts = run.starts.length ? run.starts : [run.environment];
  const keys = [...new Set(starts.flatMap((start) => Object.keys(flatten(start))))];
  const rows = keys.map((key) => [key, ...starts.map((start) => String(flatten(start)[key] ?? "–"))]);
  const header = ["", ...starts.map((_, i) => `start ${i + 1}`)];
  return section(
    "Environment of every start",
    tableFigure("Versions and devices", "Environment", header, rows, {
      changed: (row) => new Set(row.slice(1)).size > 1 && !["step", "time"].includes(row[0]),
    }),
  );
}

function flatten(tree, prefix = "") {
  if (tree === null || typeof tree !== "object" || Array.isArray(tree)) return { [prefix]: tree };
  return Object.assign(
    {},
    ...Object.entries(tree).map(([key, value]) => flatten(value, prefix ? `${prefix}.${key}` : key)),
  );
}

start((main, data, arrays) => {
  const run = withCurves(data, arrays);
  main.append(
    topBar(nameOf(run.name), nameOf(run.workdir)),
    ...firstScreen(run).filter(Boolean),
    curveSection([run]),
    run.thinned === 0
      ? ""
      : el(
          "p",
          { class: "note" },
          `${run.thinned} curves have more points than the page holds: of each stretch the lowest and the highest are drawn. metrics.jsonl has all.`,
        ),
    section("Time", timeBar(run)),
    evaluationSection(run.evaluation),
    warningSection(run),
    parameterSection(run) ?? "",
    configSection(run),
    environmentSection(run),
  );
});
