// What every plot and picture shares: which part of it is shown, and how its values are read by pointer and by keys.

const PLOT_HELP =
  "To zoom, drag over a part, spread two fingers, or turn the wheel with Ctrl; double-click shows all. In focus: arrow keys read values, + and − zoom, 0 shows all.";
const SMALLEST_PART = 1 / 64; // of a side
const DRAG = 8; // pixels: a shorter drag is a click

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// Keeps the part { x: [from, to], y: [from, to] } of a plot that is shown, in shares of the whole. `frame` takes the
// events. area() is the rectangle of the window in which that part is drawn, changed() draws it again, and reading() is
// the point { x, y } around which keys zoom, or null. With axes "x" the plot keeps its height. Without `drags` the
// owner uses drags for something else.
function zoomable(frame, { area, changed, reading = () => null, axes = "xy", drags = true }) {
  const own = axes === "x" ? ["x"] : ["x", "y"];
  const view = { x: [0, 1], y: [0, 1], pinching: false };
  const width = (axis) => view[axis][1] - view[axis][0];
  const isWhole = () => own.every((axis) => width(axis) === 1);
  // Shows a part of this size around a point, as far as the whole reaches.
  const show = (size, center) => {
    for (const axis of own) {
      const share = size > 0.999 ? 1 : Math.max(SMALLEST_PART, size);
      const from = clamp(center[axis] - share / 2, 0, 1 - share);
      view[axis] = [from, from + share];
    }
    changed();
  };
  // Scales about a point, which stays where it is on the screen.
  const scale = (factor, point) => {
    const size = clamp(width("x") * factor, SMALLEST_PART, 1);
    const ratio = size / width("x");
    const center = {};
    for (const axis of own) center[axis] = point[axis] + ((view[axis][0] + view[axis][1]) / 2 - point[axis]) * ratio;
    show(size, center);
  };
  view.reset = () => {
    view.x = [0, 1];
    view.y = [0, 1];
  };
  // The place under the pointer, in shares of the whole.
  view.at = (event) => {
    const box = area();
    return {
      x: view.x[0] + ((event.clientX - box.left) / box.width) * width("x"),
      y: view.y[0] + ((event.clientY - box.top) / box.height) * width("y"),
    };
  };
  // Moves the part so that a point is in it.
  view.follow = (point) => {
    if (own.some((axis) => point[axis] < view[axis][0] || point[axis] > view[axis][1])) show(width("x"), point);
  };

  const fingers = new Map(); // the pointers that are down, by their id
  const spread = () => {
    const [a, b] = [...fingers.values()];
    const apart =
      axes === "x" ? Math.abs(a.clientX - b.clientX) : Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    return { apart, clientX: (a.clientX + b.clientX) / 2, clientY: (a.clientY + b.clientY) / 2 };
  };
  let from = null,
    box = null;
  const drop = () => {
    box?.remove();
    from = box = null;
  };
  // A dragged part, grown to the shape of the whole.
  const dragged = (event) => {
    const [a, b] = [view.at(from), view.at(event)];
    const size = Math.max(...own.map((axis) => Math.abs(a[axis] - b[axis])));
    return { size, center: { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 } };
  };
  const far = (event) =>
    Math.abs(event.clientX - from.clientX) > DRAG || (axes === "xy" && Math.abs(event.clientY - from.clientY) > DRAG);

  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    fingers.set(event.pointerId, event);
    view.pinching = fingers.size === 2;
    // A finger that moves up or down scrolls the page.
    if (fingers.size > 1 || !drags || (event.pointerType === "touch" && axes === "xy")) return drop();
    from = event;
    frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", (event) => {
    if (fingers.has(event.pointerId)) {
      const before = fingers.size === 2 ? spread() : null;
      fingers.set(event.pointerId, event);
      if (before) {
        const after = spread();
        if (after.apart > 0) scale(before.apart / after.apart, view.at(after));
      }
    }
    if (!from || !far(event)) return;
    box ??= frame.appendChild(el("div", { class: "select" }));
    const outer = frame.getBoundingClientRect(),
      inner = area();
    const span =
      axes === "x" ? [inner.top, inner.top + inner.height] : [from.clientY, event.clientY].sort((a, b) => a - b);
    Object.assign(box.style, {
      left: `${Math.min(from.clientX, event.clientX) - outer.left}px`,
      width: `${Math.abs(event.clientX - from.clientX)}px`,
      top: `${span[0] - outer.top}px`,
      height: `${span[1] - span[0]}px`,
    });
  });
  const lift = (event) => {
    fingers.delete(event.pointerId);
    view.pinching = fingers.size === 2;
  };
  frame.addEventListener("pointerup", (event) => {
    lift(event);
    if (from && far(event)) {
      const part = dragged(event);
      show(part.size, part.center);
    }
    drop();
  });
  frame.addEventListener("pointercancel", (event) => {
    lift(event);
    drop();
  });
  const whole = () => {
    view.reset();
    changed();
  };
  frame.addEventListener("dblclick", whole);
  frame.addEventListener(
    "wheel",
    (event) => {
      if (!event.ctrlKey) return; // the page scrolls
      event.preventDefault();
      scale(2 ** (clamp(event.deltaY, -200, 200) / 200), view.at(event));
    },
    { passive: false },
  );
  frame.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const factor = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
    if (factor) {
      scale(factor, reading() ?? { x: (view.x[0] + view.x[1]) / 2, y: (view.y[0] + view.y[1]) / 2 });
      event.preventDefault();
    } else if (event.key === "0" || (event.key === "Escape" && !isWhole())) {
      whole();
      event.preventDefault(); // or Escape closes the enlarged view
    }
  });
  return view;
}

// Shows the part `view` of a node that fills its frame.
function magnify(node, view) {
  const [w, h] = [view.x[1] - view.x[0], view.y[1] - view.y[0]];
  node.style.transform = `scale(${1 / w}, ${1 / h}) translate(${-100 * view.x[0]}%, ${-100 * view.y[0]}%)`;
}

// The points of a picture that are its cells. grid() returns [rows, columns]; tell(row, column) says what is there.
function cellPoints(grid, tell) {
  const within = ([r, c]) => {
    const [rows, columns] = grid();
    return [clamp(r, 0, rows - 1), clamp(c, 0, columns - 1)];
  };
  return {
    first: [0, 0],
    pick: ({ x, y }) => {
      const [rows, columns] = grid();
      return within([Math.floor(y * rows), Math.floor(x * columns)]);
    },
    move: ([r, c], down, right) => within([r + down, c + right]),
    place: (at) => {
      const [rows, columns] = grid(),
        [r, c] = within(at);
      return { x: c / columns, y: r / rows, width: 1 / columns, height: 1 / rows };
    },
    tell: (at) => tell(...within(at)),
  };
}

// A picture that zooms and is read point by point. points: { first, pick({ x, y }), move(point, down, right),
// place(point) as { x, y, width, height } in shares of the picture, tell(point) }. ratio: its width over its height.
// `readout` is the element that tells, where several pictures share one. Returns an element with .frame and .redraw().
function picture(content, { label, points, axes = "xy", ratio = 1, readout = null }) {
  const told = readout ?? el("div", { class: "note", "aria-live": "polite" }, "\u00a0");
  const mark = el("div", { class: "reading", hidden: true });
  const frame = el("div", { class: "picture", tabindex: 0, role: "application" }, content, mark);
  const node = el("div", {}, frame, readout ? null : told);
  let at = null;
  const middle = () => {
    const { x, y, width, height } = points.place(at);
    return { x: x + width / 2, y: y + height / 2 };
  };
  const draw = () => {
    magnify(content, view);
    mark.hidden = at === null;
    if (at === null) return;
    const place = points.place(at);
    for (const [start, size, axis] of [
      ["left", "width", "x"],
      ["top", "height", "y"],
    ]) {
      const part = view[axis][1] - view[axis][0];
      mark.style[start] = `${(100 * (place[axis] - view[axis][0])) / part}%`;
      mark.style[size] = `${(100 * place[size]) / part}%`;
    }
  };
  const view = zoomable(frame, {
    area: () => frame.getBoundingClientRect(),
    changed: draw,
    reading: () => (at === null ? null : middle()),
    axes,
  });
  const read = (point) => {
    at = point;
    told.textContent = points.tell(at);
    draw();
  };
  const readPointer = (event) => read(points.pick(view.at(event)));
  frame.addEventListener("pointermove", readPointer);
  frame.addEventListener("pointerdown", readPointer);
  frame.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    read(at === null ? points.first : points.move(at, ...move));
    view.follow(middle());
    event.preventDefault();
    event.stopPropagation();
  });
  node.frame = frame;
  node.redraw = ({ text = null, shape = null } = {}) => {
    if (text !== null) frame.setAttribute("aria-label", `${text}: arrow keys read, plus and minus zoom, 0 shows all`);
    if (shape !== null) frame.style.setProperty("--ratio", shape);
    if (at !== null && !readout) told.textContent = points.tell(at);
    draw();
  };
  content.classList.add("sheet");
  node.redraw({ text: label, shape: ratio });
  return node;
}
