// The attention page: an image, a query under the pointer, and where every layer and head looks from there.

start((main, data, arrays) => {
  const look = lookData(data, arrays);
  const size = data.image_size;
  const state = {
    image: 0,
    layer: look.layers.length - 1,
    head: 0,
    panel: null,
    extra: null,
    shared: false,
    opacity: 0.6,
    y: 0.5,
    x: 0.5, // of the query, as shares of the image
    query(shape) {
      if (this.extra !== null && this.extra < shape.extra) return this.extra;
      const [r, c] = cellAt(shape, size, this.y, this.x);
      return shape.extra + r * shape.W + c;
    },
  };
  const pictures = data.images.map((image) => el("img", { src: image.picture, alt: "" }));
  const shape = () => (state.panel === null ? look.layers[state.layer] : look.maps[state.panel]);
  const head = () => (state.panel === null ? state.head : Math.min(state.head, shape().heads - 1));
  const valuesOf = (which, n) => which.map(state.image, n, state.query(which));
  const topOf = (values) => {
    let top = 0;
    for (const v of values) if (v > top) top = v;
    return top;
  };
  const at = (each) => cellAt(each, size, state.y, state.x);

  // ---- The chosen map, large.
  const canvas = el("canvas", {});
  const stage = el(
    "div",
    {
      class: "stage",
      tabindex: 0,
      role: "application",
      "aria-label":
        "The image with the attention of the chosen head. Arrow keys move the query, [ and ] change the head, page up and page down the layer, n and p the image, c chooses the class token, plus and minus zoom, 0 shows all.",
    },
    canvas,
  );
  stage.style.setProperty("--ratio", size[1] / size[0]);
  const readout = el("div", { class: "readout" });
  const live = el("div", { class: "live", "aria-live": "polite" });
  const captions = el("div", { class: "note" });
  const probabilities = el("div", { class: "probabilities" });
  const scale = el("div", { class: "bar" });
  const title = el("h3", {});

  // ---- All layers and heads.
  const heads = el("div", { class: "heads" });
  const widest = Math.max(...look.layers.map((layer) => layer.heads));
  heads.style.setProperty("--columns", Math.min(12, widest));
  heads.style.setProperty("--few", Math.min(6, widest));
  const cells = [];
  look.layers.forEach((layer, z) => {
    const row = el("div", { class: "row" });
    for (let n = 0; n < layer.heads; n++) {
      const small = el("canvas", { width: layer.W, height: layer.H });
      const button = el(
        "button",
        {
          "aria-label": `${layer.name}, head ${n + 1}`,
          title: `${layer.name}, head ${n + 1}`,
          "aria-pressed": "false",
          tabindex: n ? -1 : 0,
          onclick: () => choose({ layer: z, head: n, panel: null }),
        },
        small,
      );
      row.append(button);
      cells.push({ z, n, small, button, values: null });
    }
    heads.append(el("div", { class: "name" }, layer.name), row);
  });
  const panels = look.maps.flatMap((each, p) =>
    Array.from({ length: each.heads }, (_, n) => {
      const small = el("canvas", { width: each.W, height: each.H });
      const name = each.name + (each.heads > 1 ? `, head ${n + 1}` : "");
      const button = el(
        "button",
        { class: "pick", "aria-label": name, "aria-pressed": "false", onclick: () => choose({ panel: p, head: n }) },
        small,
      );
      return { p, n, each, small, button, node: el("div", {}, button, el("div", { class: "note" }, name)) };
    }),
  );

  const extras = [biasPanel(look, arrays, state), termsPanel(look, state)].filter(Boolean);

  function drawSmall() {
    for (const cell of cells) cell.values = valuesOf(look.layers[cell.z], cell.n);
    const top = state.shared ? Math.max(...cells.map((cell) => topOf(cell.values))) : 0;
    for (const { z, n, small, button, values } of cells) {
      paint(small, values, look.layers[z].H, look.layers[z].W, { high: top || topOf(values) });
      button.setAttribute("aria-pressed", String(state.panel === null && z === state.layer && n === state.head));
    }
    for (const { p, n, each, small, button } of panels) {
      const values = valuesOf(each, n);
      paint(small, values, each.H, each.W, { high: each.signed ? 1 : topOf(values), signed: each.signed });
      button.setAttribute("aria-pressed", String(state.panel === p && n === head()));
    }
  }

  function drawLarge() {
    const each = shape(),
      n = head(),
      values = valuesOf(each, n);
    const top = each.signed
      ? 1
      : state.shared && state.panel === null
        ? Math.max(...cells.map((cell) => topOf(cell.values)))
        : topOf(values);
    const query = state.extra !== null && state.extra < each.extra ? null : at(each);
    drawStage(canvas, pictures[state.image], each, values, {
      size,
      query: each.by_query === false ? null : query,
      high: top,
      signed: each.signed,
      opacity: state.opacity,
      lines: each.lines,
    });
    title.replaceChildren(each.name + (each.heads > 1 ? `, head ${n + 1}` : ""));
    scale.replaceChildren(scaleBar(top, { signed: Boolean(each.signed) }));
    let best = -1;
    values.forEach((value, i) => {
      if (!Number.isNaN(value) && (best < 0 || value > values[best])) best = i;
    });
    const unseen = values.reduce((count, value) => count + Number.isNaN(value), 0);
    const from =
      each.by_query === false
        ? ""
        : query
          ? `Query at row ${query[0] + 1}, column ${query[1] + 1}. `
          : `Query: ${data.extra[state.extra]}. `;
    const before = each
      .before(state.image, n, state.query(each))
      .map((value, i) => `${data.extra[i]} ${number(value, 3)}`);
    const text =
      `${from}Largest ${number(values[best], 3)} at row ${Math.floor(best / each.W) + 1}, column ${(best % each.W) + 1}.` +
      `${query ? ` Itself ${number(values[query[0] * each.W + query[1]], 3)}.` : ""}${before.length ? ` To ${before.join(", ")}.` : ""}${unseen ? ` ${unseen} of ${values.length} cells cannot be seen.` : ""}${hidden(each, values)}`;
    readout.textContent = text;
    live.textContent = `${title.textContent}. ${text}`;
    stage.dataset.drawn = JSON.stringify({
      layer: state.layer,
      head: n,
      panel: state.panel,
      image: state.image,
      query: state.query(each),
    });
  }

  // Windows that reach beyond the map hold padding, and a query attends to it.
  function hidden(each, values) {
    const sum = values.reduce((total, value) => total + (Number.isNaN(value) ? 0 : value), 0);
    return each.lines && sum < 0.995 ? ` ${percent(1 - sum)} of its attention goes to padding.` : "";
  }

  function drawImage() {
    const image = data.images[state.image];
    captions.replaceChildren(
      nameOf(image.caption, 90),
      image.label === null ? "" : el("span", {}, " · label ", nameOf(image.label)),
    );
    probabilities.replaceChildren(
      ...image.predictions.flatMap(([name, share]) => [
        nameOf(name),
        el("meter", { min: 0, max: 1, value: share, "aria-label": "probability" }),
        el("span", {}, percent(share)),
      ]),
    );
    thumbs.forEach((button, i) => button.setAttribute("aria-pressed", String(i === state.image)));
  }

  let asked = 0;
  function update() {
    // One drawing a frame, however many moves the pointer makes.
    if (asked) return;
    asked = requestAnimationFrame(() => {
      asked = 0;
      redraw();
    });
  }
  function redraw() {
    drawSmall();
    drawLarge();
    extras.forEach((panel) => panel.update());
    numbersFigure.refresh();
  }

  function choose(changes) {
    const imageChanged = "image" in changes && changes.image !== state.image;
    Object.assign(state, changes);
    if (state.panel === null) {
      state.layer = Math.min(look.layers.length - 1, Math.max(0, state.layer));
      state.head = Math.min(look.layers[state.layer].heads - 1, Math.max(0, state.head));
    }
    layerSelect.value = state.panel === null ? `${state.layer}` : `m${state.panel}`;
    if (imageChanged) drawImage();
    redraw();
  }

  const view = zoomable(stage, {
    area: () => stage.getBoundingClientRect(),
    changed: () => magnify(canvas, view),
    reading: () => ({ x: state.x, y: state.y }),
    drags: false, // a drag moves the query
  });
  const point = (event) => {
    if (view.pinching) return;
    const { x, y } = view.at(event);
    state.y = clamp(y, 0, 0.9999);
    state.x = clamp(x, 0, 0.9999);
    state.extra = null;
    update();
  };
  // A click holds the query where it is, so that the pointer can go and read elsewhere; the next click frees it.
  let held = false;
  stage.addEventListener("pointermove", (event) => {
    if (!held || event.buttons) point(event);
  });
  stage.addEventListener("pointerdown", (event) => {
    held = event.pointerType === "mouse" ? !held : true;
    point(event);
    stage.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (
      event.ctrlKey ||
      event.metaKey ||
      event.altKey ||
      ["INPUT", "SELECT"].includes(event.target.tagName) ||
      (document.querySelector("dialog[open]") && event.target !== stage)
    )
      return;
    const each = shape(),
      arrow = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (arrow && event.target !== stage) return;
    if (arrow) {
      const [r, c] = at(each);
      state.y = ((Math.min(each.H - 1, Math.max(0, r + arrow[0])) + 0.5) * each.cell[0]) / size[0];
      state.x = ((Math.min(each.W - 1, Math.max(0, c + arrow[1])) + 0.5) * each.cell[1]) / size[1];
      state.extra = null;
      view.follow({ x: state.x, y: state.y });
      redraw();
    } else if (event.key === "]" || event.key === "[")
      choose({ head: (head() + (event.key === "]" ? 1 : shape().heads - 1)) % shape().heads });
    else if (event.key === "PageDown")
      choose({ layer: state.panel === null ? state.layer + 1 : state.layer, panel: null });
    else if (event.key === "PageUp")
      choose({ layer: state.panel === null ? state.layer - 1 : state.layer, panel: null });
    else if (event.key === "n" || event.key === "p")
      choose({ image: (state.image + (event.key === "n" ? 1 : data.images.length - 1)) % data.images.length });
    else if (event.key === "c" && data.extra.length) choose({ extra: state.extra === 0 ? null : 0 });
    else return;
    event.preventDefault();
  });

  // ---- Controls.
  const thumbs = data.images.map((image, i) =>
    el(
      "button",
      { "aria-label": `Image ${i + 1}`, "aria-pressed": "false", onclick: () => choose({ image: i }) },
      el("img", { src: image.picture, alt: "" }),
    ),
  );
  const layerSelect = el(
    "select",
    {
      "aria-label": "Layer",
      onchange: (event) => {
        const value = event.target.value;
        choose(value[0] === "m" ? { panel: Number(value.slice(1)), head: 0 } : { layer: Number(value), panel: null });
      },
    },
    look.layers.map((layer, z) => el("option", { value: `${z}` }, layer.name)),
    look.maps.map((each, p) => el("option", { value: `m${p}` }, each.name)),
  );
  const extraButtons = data.extra.length
    ? choice("Query", [[null, "pointer"], ...data.extra.map((name, i) => [i, name])], null, (extra) =>
        choose({ extra }),
      )
    : null;
  const large = el("div", {}, title, stage, live, readout, scale);
  large.redraw = () => drawLarge();
  const numbersFigure = figure("The chosen map", large, {
    numbers: () => {
      const each = shape(),
        values = valuesOf(each, head());
      return {
        header: ["row", "column", "weight"],
        rows: Array.from(values, (value, i) => [
          Math.floor(i / each.W) + 1,
          (i % each.W) + 1,
          Number.isNaN(value) ? null : value,
        ]),
      };
    },
  });

  main.append(
    topBar(
      ["Where ", nameOf(data.title), " looks"],
      `${data.parameters.toLocaleString("en-US")} parameters, images of ${size[0]} x ${size[1]}`,
    ),
    el(
      "p",
      { class: "note" },
      "Move over the image. For the place under the pointer every layer and head shows where it looks; choose one to see it large. Click holds the place. ",
      `${PLOT_HELP} On this image a drag moves the query. `,
      `Weights are drawn in ${data.levels} steps of their root, to within ${Number((100 * data.error).toPrecision(2))}% of the largest weight of each query and head.`,
      data.left_out ? ` ${data.left_out.toLocaleString("en-US")} more images are not shown.` : "",
    ),
    el(
      "div",
      { class: "look" },
      el(
        "div",
        { class: "chosen" },
        el("div", { class: "thumbs", role: "group", "aria-label": "Images" }, thumbs),
        captions,
        numbersFigure,
        el(
          "div",
          { class: "bar" },
          layerSelect,
          extraButtons,
          el(
            "label",
            { class: "control" },
            "overlay ",
            el("input", {
              type: "range",
              min: 0,
              max: 1,
              step: 0.05,
              value: state.opacity,
              "aria-label": "Overlay",
              oninput: (event) => {
                state.opacity = Number(event.target.value);
                drawLarge();
              },
            }),
          ),
        ),
        data.images[0].predictions.length ? el("h3", {}, "Prediction") : "",
        probabilities,
      ),
      el(
        "div",
        {},
        panels.length
          ? el(
              "div",
              { class: "panels summary" },
              panels.map((panel) => panel.node),
            )
          : "",
        el(
          "div",
          { class: "bar" },
          el("h3", {}, "Every layer and head"),
          el(
            "span",
            { class: "control" },
            "brightest colour ",
            choice(
              "Colour scale",
              [
                [false, "of each head"],
                [true, "of all"],
              ],
              false,
              (shared) => choose({ shared }),
            ),
          ),
        ),
        heads,
      ),
    ),
    ...extras.map((panel) => panel.node),
    gaussianPanel(data, arrays) ?? "",
    distancePanel(look),
    filterPanel(data, arrays) ?? "",
    section("Model", el("pre", {}, data.model)),
  );
  drawImage();
  choose({});
  Promise.all(pictures.map((picture) => picture.decode().catch(() => null))).then(() => {
    redraw();
    document.body.dataset.drawn = "yes";
  });
  new ResizeObserver(() => drawLarge()).observe(stage.parentNode);
});
