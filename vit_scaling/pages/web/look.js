// The numbers of the attention page: from the packed rows to maps over the image.
// See pages/quantize.py and pages/families.py.

function lookData(data, arrays) {
  // Rows of weights are roots of shares of the row's largest value; rows with signs are plain shares of it.
  const scaleOf = (q) => (q === 65535 ? 0 : 2 ** (8 - (24 * q) / 65535));
  const squares = Float32Array.from({ length: 256 }, (_, i) => (i / data.levels) ** 2);

  // One row [S]: of image b, head n and query q, of `about` = { array, largest, signed, images }.
  function row(about, heads, queries, S, b, n, q) {
    const index = ((about.images === 1 ? 0 : b) * heads + n) * queries + q;
    const entries = arrays[about.array];
    const largest = arrays[about.largest][index];
    const scale = about.signed ? largest : scaleOf(largest);
    const values = new Float32Array(S);
    for (let s = 0, at = index * S; s < S; s++, at++)
      values[s] = about.signed ? (entries[at] / 127) * scale : squares[entries[at]] * scale;
    return values;
  }

  const extra = data.extra.length;
  const layers = data.layers.map((layer) => {
    const [H, W] = layer.grid,
      cells = H * W,
      queries = cells + (layer.places ? 0 : extra);
    const places = layer.places ? arrays[layer.places] : null;
    const S = layer.entries;
    // A row over the cells of the map; NaN where the query cannot see.
    const spread = (values, q) => {
      if (!places) return values.subarray(S - cells);
      const map = new Float32Array(cells).fill(NaN);
      for (let s = 0; s < S; s++) {
        const place = places[q * S + s];
        if (place >= 0) map[place] = values[s];
      }
      return map;
    };
    const read = (about, b, n, q) => row(about, layer.heads, queries, S, b, n, q);
    return {
      ...layer,
      H,
      W,
      cells,
      extra: places ? 0 : extra,
      // Weights of a query over the map, and those of the tokens before it.
      map: (b, n, q) => spread(read(layer.weights, b, n, q), q),
      before: (b, n, q) => (places ? [] : Array.from(read(layer.weights, b, n, q).subarray(0, extra))),
      term: (name, b, n, q) => spread(read(layer.terms[name], b, n, q), q),
      // A k x k neighbourhood as it is stored, by offset, NaN outside the image.
      local: (about, b, n, q) => {
        const values = read(about, b, n, q);
        for (let s = 0; s < S; s++) if (places[q * S + s] < 0) values[s] = NaN;
        return values;
      },
    };
  });

  const maps = data.maps.map((about) => {
    const [H, W] = data.layers[0].grid,
      S = about.entries,
      queries = about.by_query ? S : 1;
    return {
      ...about,
      H,
      W,
      cells: H * W,
      cell: data.layers[0].cell,
      extra: about.by_query ? S - H * W : 0,
      map: (b, n, q) => row(about, about.heads, queries, S, b, n, about.by_query ? q : 0).subarray(S - H * W),
      before: () => [],
    };
  });
  return { layers, maps };
}

// Which cell of a grid lies under a place of the image, given as shares of its height and width.
function cellAt(shape, size, y, x) {
  const r = Math.floor((y * size[0]) / shape.cell[0]),
    c = Math.floor((x * size[1]) / shape.cell[1]);
  return [Math.min(shape.H - 1, Math.max(0, r)), Math.min(shape.W - 1, Math.max(0, c))];
}

// Draws an image, dimmed where the query cannot see, under a map; outlines the query's cell and the windows.
function drawStage(canvas, picture, shape, values, { size, query, high, signed, opacity, lines }) {
  const box = canvas.parentNode.clientWidth || 360,
    ratio = Math.min(2, window.devicePixelRatio || 1);
  const width = Math.round(box * ratio),
    height = Math.round((width * size[0]) / size[1]);
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  const sy = height / size[0],
    sx = width / size[1];
  const cellH = shape.cell[0] * sy,
    cellW = shape.cell[1] * sx;
  const cells = document.createElement("canvas");
  paint(cells, values, shape.H, shape.W, { high, signed });
  // The part of the image that is seen, cut out by the map's own cells.
  const seen = document.createElement("canvas");
  seen.width = width;
  seen.height = height;
  const cut = seen.getContext("2d");
  cut.imageSmoothingEnabled = false;
  cut.drawImage(picture, 0, 0, width, height);
  cut.globalCompositeOperation = "destination-in";
  cut.drawImage(cells, 0, 0, cellW * shape.W, cellH * shape.H);
  context.globalAlpha = 0.22;
  context.drawImage(picture, 0, 0, width, height);
  context.globalAlpha = 1;
  context.drawImage(seen, 0, 0);
  context.globalAlpha = opacity;
  context.drawImage(cells, 0, 0, cellW * shape.W, cellH * shape.H);
  context.globalAlpha = 1;
  if (lines) {
    // Windows of a shifted layer begin `shift` cells into the map, and wrap around.
    const [window_, shift] = lines;
    context.strokeStyle = "rgb(255 255 255 / 0.75)";
    context.lineWidth = Math.max(1, ratio);
    context.beginPath();
    const first = shift ? shift % window_ : 0;
    for (let r = first; r <= shape.H; r += window_) {
      context.moveTo(0, r * cellH);
      context.lineTo(width, r * cellH);
    }
    for (let c = first; c <= shape.W; c += window_) {
      context.moveTo(c * cellW, 0);
      context.lineTo(c * cellW, height);
    }
    context.stroke();
  }
  if (query) {
    const [r, c] = query;
    context.strokeStyle = "#ffffff";
    context.lineWidth = 4 * ratio;
    context.strokeRect(c * cellW, r * cellH, cellW, cellH);
    context.strokeStyle = "#d1003f";
    context.lineWidth = 2 * ratio;
    context.strokeRect(c * cellW, r * cellH, cellW, cellH);
  }
}
