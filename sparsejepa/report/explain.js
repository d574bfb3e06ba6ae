// Pictures and controls of the page. All text is in the page itself; data comes from #data.
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

const data = JSON.parse($("#data").textContent);
const [rows, cols] = data.grid;
const patches = rows * cols;
const count = data.names.length;
const owner = bytes(data.owner); // [images of the explorer, patches]; 255: no group
const levels = bytes(data.levels); // [images of the explorer, patches, groups]
const largest = (values) => values.reduce((best, v, i) => (v > values[best] ? i : best), 0);
const list = (items, text, most = 5) =>
  items.slice(0, most).map(text).join(", ") + (items.length > most ? ` and ${items.length - most} more` : "");
const title = (g) => `group ${g}${data.names[g] ? ` (${data.names[g]})` : ""}`;

// State of the explorer: which image, which group is pointed at, which one is kept lit.
let place = 0;
let pointed = null;
let kept = null;
let cursor = null;

// ---- images -----------------------------------------------------------------------------------
const loaded = {};
function picture(i) {
  return (loaded[i] ??= (async () => {
    const image = new Image();
    image.src = `data:image/webp;base64,${data.images[i]}`;
    await image.decode();
    return image;
  })());
}

let theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  theme = Object.fromEntries(["ink", "line"].map((n) => [n, style.getPropertyValue(`--${n}`).trim()]));
}

// Size a canvas to its place in the page and return its context; `shape` is height over width.
function prepare(canvas, shape) {
  canvas.style.aspectRatio = `1 / ${shape}`;
  const width = Math.round(canvas.clientWidth * Math.min(devicePixelRatio, 2));
  const height = Math.round(width * shape);
  if (!width) return null;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.globalAlpha = 1;
  return context;
}

// Colour patch p by colour(p) -> [css colour, alpha], and outline what outline(p) tells apart.
function overlay(context, colour, outline, line) {
  const w = context.canvas.width / cols, h = context.canvas.height / rows;
  for (let p = 0; p < patches; p++) {
    const [fill, alpha] = colour(p);
    const x = Math.round((p % cols) * w), y = Math.round(Math.floor(p / cols) * h);
    context.globalAlpha = alpha;
    context.fillStyle = fill;
    context.fillRect(x, y, Math.round(((p % cols) + 1) * w) - x, Math.round((Math.floor(p / cols) + 1) * h) - y);
  }
  context.globalAlpha = 1;
  if (context.canvas.clientWidth < 12 * cols) return; // lines would hide so small a picture
  context.strokeStyle = line;
  context.lineWidth = Math.max(1, w / 14);
  context.beginPath();
  for (let p = 0; p < patches; p++) {
    const x = (p % cols) * w, y = Math.floor(p / cols) * h;
    if ((p + 1) % cols && outline(p) !== outline(p + 1)) { context.moveTo(x + w, y); context.lineTo(x + w, y + h); }
    if (p + cols < patches && outline(p) !== outline(p + cols)) { context.moveTo(x, y + h); context.lineTo(x + w, y + h); }
  }
  context.stroke();
}

// The heat map of one group: full colour from 3 rms on, an outline at 1 rms.
function heat(context, g, level) {
  context.globalAlpha = 0.5;
  context.fillStyle = "#14181c";
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  overlay(context, (p) => [data.colours[g], 0.8 * Math.min(1, (level(p) * data.scale) / 3)],
    (p) => level(p) * data.scale >= 1, "#fff");
}

function drawImage(context, image) {
  context.imageSmoothingEnabled = image.naturalWidth >= 64;
  context.drawImage(image, 0, 0, context.canvas.width, context.canvas.height);
}

// ---- explorer ---------------------------------------------------------------------------------
const stage = $("#stage");
const thumbs = $$(".thumbs button");
const chips = $$("#chips .chip");

async function drawExplored(canvas, n) {
  const image = await picture(data.explorer[n]);
  const context = prepare(canvas, data.shape[0] / data.shape[1]);
  if (!context) return;
  drawImage(context, image);
  const own = (p) => owner[n * patches + p];
  const level = (g) => (p) => levels[(n * patches + p) * count + g];
  const strength = $("#strength").value / 100;
  const g = shown();
  if (heated()) {
    heat(context, g, level(g));
  } else if (g === null) {
    overlay(context, (p) => [data.colours[own(p)] ?? "#808080", strength * 0.9], own, `rgb(255 255 255 / ${strength})`);
  } else {
    overlay(context, (p) => (own(p) === g ? [data.colours[g], strength * 0.7] : ["#14181c", 0.72]),
      (p) => own(p) === g, data.colours[g]);
  }
  if (canvas === stage && cursor !== null) {
    const w = canvas.width / cols, h = canvas.height / rows;
    context.strokeStyle = "#fff";
    context.lineWidth = 2;
    context.strokeRect((cursor % cols) * w + 1, Math.floor(cursor / cols) * h + 1, w - 2, h - 2);
  }
}

// The heat map of the group with most patches is shown while no group is chosen.
const heated = () => $("input[name=mode]:checked").value === "heat";
const shown = () => pointed ?? kept ?? (heated() ? largest(shares(place)) : null);

function shares(n) {
  const found = new Array(count).fill(0);
  for (let p = 0; p < patches; p++) if (owner[n * patches + p] < count) found[owner[n * patches + p]]++;
  return found;
}

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawExplored(stage, place);
    thumbs.forEach((button, n) => drawExplored($("canvas", button), n));
    chips.forEach((chip, g) => {
      chip.classList.toggle("lit", g === shown());
      chip.setAttribute("aria-pressed", g === kept);
    });
  });
}

function choose(n, focus = false) {
  place = Math.max(0, Math.min(thumbs.length - 1, n));
  thumbs.forEach((button, i) => {
    button.setAttribute("aria-selected", i === place);
    button.tabIndex = i === place ? 0 : -1;
  });
  if (focus) thumbs[place].focus();
  describe();
  redraw();
}

function describe() {
  const found = shares(place);
  chips.forEach((chip, g) => {
    $("small", chip).textContent = found[g] || "";
    chip.classList.toggle("absent", !found[g]);
  });
  const order = found.map((n, g) => g).filter((g) => found[g]).sort((a, b) => found[b] - found[a]);
  const text = list(order, (g) => `${title(g)}: ${found[g]}`) || "no group is on";
  $("#image-text").textContent =
    `Image ${place + 1} of ${thumbs.length}: ${data.labels[data.explorer[place]]}. Patches: ${text}.`;
  $("#stage-readout").textContent = "Point at a patch to see which groups it activates.";
}

function light(g) {
  pointed = g;
  redraw();
}

function keep(g) {
  kept = kept === g ? null : g;
  pointed = kept;
  redraw();
}

function readPatch(p) {
  cursor = p;
  if (p === null) return light(null);
  const level = Array.from(levels.subarray((place * patches + p) * count, (place * patches + p + 1) * count));
  const order = level.map((_, g) => g).filter((g) => level[g]).sort((a, b) => level[b] - level[a]);
  const text = order.slice(0, 3).map((g) => `${title(g)} ${(level[g] * data.scale).toFixed(1)}`).join(", ");
  $("#stage-readout").textContent =
    `Row ${Math.floor(p / cols) + 1}, column ${(p % cols) + 1}: ${text ? `${text} rms` : "no group"}.`;
  const g = owner[place * patches + p];
  light(g < count ? g : null);
}

// Let pointer and arrow keys go over the cells of a canvas; report() gets a cell's number or null.
function cells(canvas, height, width, report) {
  let at = 0;
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * height);
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    at = y * width + x;
    report(at);
  };
  for (const name of ["pointermove", "pointerdown"]) canvas.addEventListener(name, point);
  canvas.addEventListener("pointerleave", () => report(null));
  canvas.addEventListener("blur", () => report(null));
  canvas.addEventListener("keydown", (event) => {
    const [dx, dy] = ARROWS[event.key] ?? [];
    if (dx === undefined) return;
    event.preventDefault();
    const x = Math.max(0, Math.min(width - 1, (at % width) + dx));
    const y = Math.max(0, Math.min(height - 1, Math.floor(at / width) + dy));
    at = y * width + x;
    report(at);
  });
  return () => at;
}
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const patchAt = cells(stage, rows, cols, readPatch);
const keepPatch = () => owner[place * patches + patchAt()] < count && keep(owner[place * patches + patchAt()]);
stage.addEventListener("click", keepPatch);
stage.addEventListener("keydown", (event) => event.key === "Enter" && keepPatch());
chips.forEach((chip, g) => {
  chip.addEventListener("pointerenter", () => light(g));
  chip.addEventListener("focus", () => chip.matches(":focus-visible") && light(g));
  for (const name of ["pointerleave", "blur"]) chip.addEventListener(name, () => light(null));
  chip.addEventListener("click", () => keep(g));
});
thumbs.forEach((button, n) => button.addEventListener("click", () => choose(n)));
$(".thumbs").addEventListener("keydown", (event) => {
  const perRow = getComputedStyle($(".thumbs")).gridTemplateColumns.split(" ").length;
  const [dx, dy] = ARROWS[event.key] ?? [];
  const to = { Home: 0, End: thumbs.length - 1 }[event.key] ?? (dx === undefined ? null : place + dx + dy * perRow);
  if (to === null) return;
  event.preventDefault();
  choose(to, true);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { kept = pointed = null; redraw(); }
});
$$("input[name=mode], #strength").forEach((input) => input.addEventListener("input", redraw));
$$("[data-show]").forEach((button) => button.addEventListener("click", () => {
  kept = Number(button.dataset.show);
  redraw();
  $("#explorer").scrollIntoView();
}));

// ---- the map of W -----------------------------------------------------------------------------
const wide = data.map.columns.length;
const norms = new Uint16Array(bytes(data.map.norms).buffer); // [groups, latents]
const norm = (g, j) => (norms[g * wide + j] / 65535) * data.map.largest;
const w = $("#w");

function drawMap(cell = null) {
  const row = parseFloat(getComputedStyle($(".map")).getPropertyValue("--row"));
  w.style.minWidth = `${3 * wide}px`;
  w.style.height = `${row * count}px`;
  const context = prepare(w, (row * count) / w.clientWidth);
  const scale = w.width / wide, tall = w.height / count;
  context.clearRect(0, 0, w.width, w.height);
  data.map.rows.forEach((g, y) => data.map.columns.forEach((j, x) => {
    const value = norms[g * wide + j] / 65535;
    context.globalAlpha = value ? 0.12 + 0.88 * value : 0.35;
    context.fillStyle = value ? data.colours[g] : theme.line;
    const left = Math.round(x * scale);
    context.fillRect(left, Math.round(y * tall), Math.round((x + 1) * scale) - left, Math.round(tall) - 1);
  }));
  context.globalAlpha = 1;
  if (cell === null) return;
  context.strokeStyle = theme.ink;
  context.lineWidth = 1;
  context.strokeRect(Math.round((cell % wide) * scale) + 0.5, 0.5, Math.max(2, scale), w.height - 1);
  context.strokeRect(0.5, Math.round(Math.floor(cell / wide) * tall) + 0.5, w.width - 1, tall - 1);
}

cells(w, count, wide, (cell) => {
  drawMap(cell);
  if (cell === null) return;
  const g = data.map.rows[Math.floor(cell / wide)], j = data.map.columns[cell % wide];
  const feeds = data.map.rows.filter((other) => norms[other * wide + j]).sort((a, b) => norm(b, j) - norm(a, j));
  const listed = list(feeds, (other) => `${other} (${norm(other, j).toFixed(2)})`);
  $("#w-readout").textContent = `Latent ${j}, ${title(g)}: ${norms[g * wide + j] ? norm(g, j).toFixed(3) : "exactly zero"}. ` +
    (feeds.length ? `The latent feeds ${feeds.length} of ${count} groups: ${listed}.` : "The latent feeds no group.");
});

// ---- gallery ----------------------------------------------------------------------------------
async function drawThumb(canvas) {
  const { image: i, heat: g, patch } = canvas.dataset;
  const image = await picture(i);
  if (patch === undefined) {
    const context = prepare(canvas, data.shape[0] / data.shape[1]);
    if (!context) return;
    drawImage(context, image);
    const map = g === undefined ? null : data.heat[`${i},${g}`];
    if (map) { const level = bytes(map); heat(context, g, (p) => level[p]); }
    return;
  }
  // A crop of 3 x 3 patches, moved inside the image, the patch itself outlined.
  const pw = image.naturalWidth / cols, ph = image.naturalHeight / rows;
  const [sw, sh] = [Math.min(3, cols) * pw, Math.min(3, rows) * ph];
  const x = (patch % cols) * pw, y = Math.floor(patch / cols) * ph;
  const left = Math.max(0, Math.min(image.naturalWidth - sw, x - pw));
  const top = Math.max(0, Math.min(image.naturalHeight - sh, y - ph));
  const context = prepare(canvas, sh / sw);
  if (!context) return;
  const scale = canvas.width / sw;
  context.imageSmoothingEnabled = image.naturalWidth >= 64;
  context.drawImage(image, left, top, sw, sh, 0, 0, canvas.width, canvas.height);
  for (const [colour, wide] of [["#14181c", 4], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = wide;
    context.strokeRect((x - left) * scale + 1, (y - top) * scale + 1, pw * scale - 2, ph * scale - 2);
  }
}

const gallery = $$(".group canvas");
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) drawThumb(target);
}, { rootMargin: "400px" });
gallery.forEach((canvas) => near.observe(canvas));
addEventListener("beforeprint", () => gallery.forEach(drawThumb));

const save = $("#save");
$$("[data-rename]").forEach((input) => input.addEventListener("input", () => {
  const g = input.dataset.rename;
  data.names[g] = input.value.trim();
  $$(`[data-name="${g}"]`).forEach((element) => { element.textContent = data.names[g]; });
  save.classList.add("unsaved");
  describe();
}));
$("#download").addEventListener("click", () => {
  const names = Object.fromEntries(data.names.map((name, g) => [g, name]).filter(([, name]) => name));
  const blob = new Blob([JSON.stringify({ names }, null, 2) + "\n"], { type: "application/json" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "groups.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  save.classList.remove("unsaved");
});
addEventListener("beforeunload", (event) => save.classList.contains("unsaved") && event.preventDefault());

// ---- start, and start again when width or colours change ----------------------------------------
function all() {
  readTheme();
  drawMap();
  redraw();
}
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  all();
  gallery.forEach((canvas) => { near.unobserve(canvas); near.observe(canvas); });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
readTheme();
drawMap();
if (thumbs.length) choose(0);
