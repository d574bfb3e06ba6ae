// Pictures and controls of the page. All text is in the page itself; data comes from #data.
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

const data = JSON.parse($("#data").textContent);
const [rows, cols] = data.grid;
const patches = rows * cols;
const count = data.colours.length;
const owner = bytes(data.owner); // [images of the explorer, patches]; 255: no group
const levels = bytes(data.levels); // [images of the explorer, patches, groups]

// State of the explorer: which image, which group is pointed at, which one is kept.
let place = 0;
let pointed = null;
let kept = null;

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

// Size a canvas to its place in the page and return its context; `shape` is height over width.
function prepare(canvas, shape) {
  canvas.style.aspectRatio = `1 / ${shape}`;
  const width = Math.round(canvas.clientWidth * Math.min(devicePixelRatio, 2));
  const height = Math.round(width * shape);
  if (!width) return null;
  Object.assign(canvas, { width, height }); // clears it
  return canvas.getContext("2d");
}

function drawImage(context, image, ...part) {
  context.imageSmoothingEnabled = image.naturalWidth >= 64;
  const { width, height } = context.canvas;
  context.drawImage(image, ...(part.length ? part : [0, 0, image.naturalWidth, image.naturalHeight]), 0, 0, width, height);
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
  const g = pointed ?? kept;
  if (g === null) overlay(context, (p) => [data.colours[own(p)] ?? "#808080", 0.45], own, "rgb(255 255 255 / .5)");
  else heat(context, g, (p) => levels[(n * patches + p) * count + g]);
}

function redraw() {
  drawExplored(stage, place);
  thumbs.forEach((button, n) => {
    button.setAttribute("aria-pressed", n === place);
    drawExplored($("canvas", button), n);
  });
  chips.forEach((chip, g) => {
    chip.classList.toggle("lit", g === (pointed ?? kept));
    chip.setAttribute("aria-pressed", g === kept);
  });
}

function choose(n) {
  place = n;
  const found = new Array(count).fill(0);
  for (let p = 0; p < patches; p++) if (owner[n * patches + p] < count) found[owner[n * patches + p]]++;
  chips.forEach((chip, g) => {
    $("small", chip).textContent = found[g] || "";
    chip.classList.toggle("absent", !found[g]);
  });
  $("#image-text").textContent = `Image ${n + 1} of ${thumbs.length}: ${data.labels[data.explorer[n]]}. ` +
    "The numbers beside the groups count its patches.";
  $("#stage-readout").textContent = "Point at a patch to see which groups it activates.";
  redraw();
}

function point(g) {
  if (g === pointed) return;
  pointed = g;
  redraw();
}

function keep(g) {
  kept = kept === g ? null : g;
  pointed = null;
  redraw();
}

// Let a pointer go over the cells of a canvas; report(cell, clicked) gets null when it leaves.
function cells(canvas, height, width, report) {
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * height);
    if (x >= 0 && y >= 0 && x < width && y < height) report(y * width + x, event.type === "click");
  };
  for (const name of ["pointermove", "click"]) canvas.addEventListener(name, at);
  canvas.addEventListener("pointerleave", () => report(null, false));
}

cells(stage, rows, cols, (p, clicked) => {
  if (p === null) return point(null);
  const at = (place * patches + p) * count;
  const level = Array.from(levels.subarray(at, at + count));
  const order = level.map((_, g) => g).filter((g) => level[g]).sort((a, b) => level[b] - level[a]);
  const text = order.slice(0, 3).map((g) => `group ${g} ${(level[g] * data.scale).toFixed(1)}`).join(", ");
  $("#stage-readout").textContent =
    `Row ${Math.floor(p / cols) + 1}, column ${(p % cols) + 1}: ${text ? `${text} rms` : "no group"}.`;
  const g = owner[place * patches + p] < count ? owner[place * patches + p] : null;
  if (clicked) keep(g);
  else point(g);
});
chips.forEach((chip, g) => {
  chip.addEventListener("pointerenter", () => point(g));
  chip.addEventListener("pointerleave", () => point(null));
  chip.addEventListener("click", () => keep(g));
});
thumbs.forEach((button, n) => button.addEventListener("click", () => choose(n)));
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

function drawMap() {
  const row = parseFloat(getComputedStyle($(".map")).getPropertyValue("--row"));
  w.style.minWidth = `${3 * wide}px`;
  const context = prepare(w, (row * count) / w.clientWidth);
  if (!context) return;
  const empty = getComputedStyle(document.documentElement).getPropertyValue("--line").trim();
  const scale = w.width / wide, tall = w.height / count;
  data.map.rows.forEach((g, y) => data.map.columns.forEach((j, x) => {
    const value = norms[g * wide + j] / 65535;
    context.globalAlpha = value ? 0.12 + 0.88 * value : 0.35;
    context.fillStyle = value ? data.colours[g] : empty;
    const left = Math.round(x * scale);
    context.fillRect(left, Math.round(y * tall), Math.round((x + 1) * scale) - left, Math.round(tall) - 1);
  }));
}

cells(w, count, wide, (cell) => {
  if (cell === null) return;
  const g = data.map.rows[Math.floor(cell / wide)], j = data.map.columns[cell % wide];
  const feeds = data.map.rows.filter((other) => norms[other * wide + j]).sort((a, b) => norm(b, j) - norm(a, j));
  const listed = feeds.slice(0, 5).map((other) => `${other} (${norm(other, j).toFixed(2)})`).join(", ");
  $("#w-readout").textContent = `Latent ${j}, group ${g}: ${norms[g * wide + j] ? norm(g, j).toFixed(3) : "exactly zero"}. ` +
    `The latent feeds ${feeds.length} of ${count} groups${listed ? `, most ${listed}` : ""}.`;
});

// ---- cards --------------------------------------------------------------------------------------
async function drawCard(canvas) {
  const { image: i, heat: g, patch } = canvas.dataset;
  const image = await picture(i);
  if (patch === undefined) {
    const context = prepare(canvas, data.shape[0] / data.shape[1]);
    if (!context) return;
    drawImage(context, image);
    const level = bytes(data.heat[`${i},${g}`]);
    return heat(context, g, (p) => level[p]);
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
  drawImage(context, image, left, top, sw, sh);
  for (const [colour, wide] of [["#14181c", 4], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = wide;
    context.strokeRect((x - left) * scale + 1, (y - top) * scale + 1, pw * scale - 2, ph * scale - 2);
  }
}

// ---- start, and start again when width or colours change ----------------------------------------
function all() {
  drawMap();
  redraw();
  $$(".group canvas").forEach(drawCard);
}
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  all();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
choose(0);
all();
