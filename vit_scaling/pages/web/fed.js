// Training images as the network sees them: after augmentation, and after mixing with their neighbours in the batch.

start((main, data) => {
  const labels = (each) =>
    each.map(([name, share], i) => [i ? ", " : "", nameOf(name, 30), share < 0.9995 ? ` ${percent(share, 0)}` : ""]);
  const steps = [...new Set(data.images.map((image) => image.step))];
  main.append(
    topBar(
      ["What ", nameOf(data.title), " is fed"],
      `seed ${data.seed}${data.seed === data.own_seed ? "" : ` (the run has ${data.own_seed})`}, batches of ${data.batch_size}`,
    ),
    el(
      "p",
      { class: "note" },
      data.mixing
        ? "Above: after augmentation. Below: after mixing, with the target that the loss sees."
        : "After augmentation; this run mixes no images.",
    ),
    ...steps.map((step) => {
      const own = data.images.filter((image) => image.step === step);
      return section(
        `After ${step.toLocaleString("en-US")} steps`,
        el(
          "div",
          { class: "tiles" },
          own.map((image, i) =>
            el(
              "div",
              {},
              el("img", { src: image.before, alt: `image ${i + 1} before mixing` }),
              el("div", {}, labels(image.label)),
              data.mixing
                ? [
                    el("img", { src: image.after, alt: `image ${i + 1} after mixing` }),
                    el("div", { class: "soft" }, labels(image.target)),
                  ]
                : "",
            ),
          ),
        ),
      );
    }),
    tableFigure("Labels and targets", "One row for each image", ["steps before", "image", "label", "target"], rows()),
  );

  function rows() {
    const text = (each) =>
      each.map(([name, share]) => (share < 0.9995 ? `${name} ${number(share, 3)}` : name)).join(", ");
    const count = data.images.length / steps.length;
    return data.images.map((image, i) => [image.step, (i % count) + 1, text(image.label), text(image.target)]);
  }
});
