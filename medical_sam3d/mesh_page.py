"""A page on which meshes can be turned: one HTML file without network, for a laptop and a phone.

Truth, input, base and prediction of an organ side by side, turned and zoomed together; every surface but the truth's is coloured
by how far it lies outside or inside of the true one. A small renderer with a depth buffer, on a plain canvas: no GPU is needed.
"""

import base64
import html
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoint import write_text
from meshes import Mesh

MESH_BYTES = 3_000_000  # of all meshes on a page, as text
BYTES_PER_VERTEX = 26  # 6 for its place, 12 for two faces, 1 for its distance; four letters for three of them
VERTICES = (400, 6000)  # of a mesh on the page: no fewer, and no more however few meshes there are
STEPS = 65535  # to which a place is rounded, in the case's extent
OUTSIDE = (178, 24, 43)  # red; these two are told apart by people who see red and green alike
INSIDE = (33, 102, 172)  # blue
ON = (236, 236, 236)
PLAIN = (222, 205, 170)  # the truth


class View(NamedTuple):
    """One mesh in mm of a case; distances (V,): of its vertices to the true surface in mm, outside positive; None: the truth."""

    name: str
    caption: str
    mesh: Mesh
    distances: np.ndarray | None


class CaseViews(NamedTuple):
    name: str
    views: list[View]


# ---- meshes as text --------------------------------------------------------------------------------------------------


def simplified(mesh: Mesh, values: np.ndarray, most: int) -> tuple[Mesh, np.ndarray]:
    """A mesh of at most so many vertices, for the eye: those in one cell of a grid become their mean, and so do their values."""
    vertices, faces = mesh
    if len(vertices) <= most:
        return mesh, values
    low, extent = vertices.min(axis=0), float(np.ptp(vertices, axis=0).max())
    cell = extent / np.sqrt(most)
    while True:
        cells = np.floor((vertices - low) / cell).astype(np.int64)
        keys = (cells * (int(extent / cell) + 2) ** np.arange(3)).sum(axis=1)
        _, member, counts = np.unique(keys, return_inverse=True, return_counts=True)
        if len(counts) <= most:
            break
        cell *= max(1.02, np.sqrt(len(counts) / most))
    means = [np.bincount(member, column) / counts for column in (*vertices.T, values)]
    faces = member[faces]
    kept = (faces != np.roll(faces, 1, axis=1)).all(axis=1)  # what shrank to a line or a point goes
    return Mesh(np.stack(means[:3], axis=1), faces[kept]), means[3]


def base64_of(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def packed_view(view: View, low: np.ndarray, extent: float, limit: float, most: int) -> dict:
    """A view as JSON: places (V, 3) uint16 in the case's cube, faces (F, 3) uint16, distances (V,) int8 in limits / 127."""
    plain = view.distances is None
    mesh, values = simplified(view.mesh, np.zeros(len(view.mesh.vertices)) if plain else view.distances, most)
    places = np.round((mesh.vertices - low) / extent * STEPS).clip(0, STEPS).astype("<u2")
    shades = np.round(np.clip(values / limit, -1, 1) * 127).astype(np.int8)
    faces = mesh.faces.astype("<u2")
    packed = {"name": view.name, "caption": view.caption, "places": base64_of(places), "faces": base64_of(faces)}
    return packed | ({} if plain else {"distances": base64_of(shades)})


def packed_case(case: CaseViews, limit: float, most: int) -> dict:
    """A case as JSON: all its views in one cube."""
    points = np.concatenate([view.mesh.vertices for view in case.views])
    low, high = points.min(axis=0), points.max(axis=0)
    extent = float((high - low).max())
    middle = ((high + low) / 2 - low) / extent  # the views turn about it
    views = [packed_view(view, low, extent, limit, most) for view in case.views]
    return {"name": case.name, "extent": extent, "middle": middle.round(5).tolist(), "views": views}


def round_limit(cases: list[CaseViews]) -> float:
    """Where the colours end, in mm: a round number that nearly all distances of the better half of the meshes are below."""
    views = [view.distances for case in cases for view in case.views if view.distances is not None and len(view.distances)]
    most = float(np.median([np.percentile(np.abs(distances), 98) for distances in views])) if views else 1.0
    power = 10.0 ** np.floor(np.log10(max(most, 1e-2)))
    return float(next(step * power for step in (1, 2, 5, 10) if most <= step * power * (1 + 1e-9)))


# ---- the page --------------------------------------------------------------------------------------------------------


def data_of(cases: list[CaseViews]) -> str:
    """All cases as JSON that may stand inside an HTML page, whatever they are called."""
    meshes = sum(len(case.views) for case in cases)
    most = int(np.clip(MESH_BYTES / max(1, meshes) / BYTES_PER_VERTEX, *VERTICES))
    limit = round_limit(cases)
    packed = {"limit": limit, "cases": [packed_case(case, limit, most) for case in cases]}
    colors = {"outside": OUTSIDE, "inside": INSIDE, "on": ON, "plain": PLAIN}
    return json.dumps(packed | {"colors": colors}, separators=(",", ":")).replace("<", "\\u003c")


def html_table(head: list[str], lines: list[list]) -> str:
    """A table; what follows a line break in a cell is written small below the rest."""

    def cell(text):
        first, _, rest = html.escape(str(text)).partition("\n")
        return first + (f"<small>{rest}</small>" if rest else "")

    rows = [("th", head), *(("td", line) for line in lines)]
    cells = ["".join(f"<{tag}>{cell(text)}</{tag}>" for text in line) for tag, line in rows]
    return f'<div class="table"><table>{"".join(f"<tr>{line}</tr>" for line in cells)}</table></div>'


def legend_of(limit: float) -> str:
    red, white, blue = (f"rgb{color}" for color in (OUTSIDE, ON, INSIDE))
    half = f"{limit / 2:g}"
    marks = "".join(f"<span>{text}</span>" for text in (f"-{limit:g} mm", f"-{half}", "0", f"+{half}", f"+{limit:g} mm"))
    return (
        f'<div class="legend"><div class="bar" style="background:linear-gradient(to right,{blue},{white},{red})"></div>'
        f'<div class="marks">{marks}</div>'
        '<p class="note">blue: inside the true surface; red: outside of it</p></div>'
    )


def write_page(
    path: Path, title: str, notes: list[str], cases: list[CaseViews], sections: dict[str, str], pictures: dict
) -> None:
    """page.html. sections: heading -> HTML (html_table's); pictures: heading -> PNG file, which becomes part of the page."""
    parts = [f"<h1>{html.escape(title)}</h1>", *(f'<p class="note">{html.escape(note)}</p>' for note in notes)]
    if cases:
        measured = any(view.distances is not None for case in cases for view in case.views)
        parts += [VIEWER.replace("LEGEND", legend_of(round_limit(cases)) if measured else "")]
    parts += [f"<h2>{html.escape(name)}</h2>{table}" for name, table in sections.items()]
    for name, file in pictures.items():
        source = base64.b64encode(file.read_bytes()).decode()
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="{html.escape(name)}" src="data:image/png;base64,{source}">')
    script = f'<script type="application/json" id="data">{data_of(cases)}</script><script>{SCRIPT}</script>' if cases else ""
    head = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{RULES}">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>"""
    write_text(path, f"{head}<body>{''.join(parts)}{script}</body></html>\n")


# Nothing comes from elsewhere, and nothing goes there.
RULES = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
p { margin: 0.3rem 0; } .note { opacity: 0.75; font-size: 0.9rem; }
.tools { display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center; margin: 1rem 0 0.6rem; }
select, button { font: inherit; padding: 0.35rem 0.7rem; border: 1px solid var(--line); border-radius: 0.4rem; max-width: 100%; }
select { flex: 1 1 16rem; min-width: 0; }
#views { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 12.5rem), 1fr)); gap: 0.6rem; }
figure { margin: 0; min-width: 0; border: 1px solid var(--line); border-radius: 0.6rem; overflow: hidden; }
canvas { display: block; width: 100%; aspect-ratio: 1; touch-action: none; cursor: grab; }
canvas:focus-visible { outline: 2px solid #1f6fd6; outline-offset: -2px; }
figcaption { padding: 0.3rem 0.6rem 0.5rem; font-size: 0.9rem; line-height: 1.35; }
figcaption small { display: block; opacity: 0.75; }
.legend { max-width: 30rem; margin: 0.8rem auto; } .bar { height: 0.8rem; border-radius: 0.4rem; }
.marks { display: flex; justify-content: space-between; font-size: 0.85rem; } .legend .note { text-align: center; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td small { display: block; opacity: 0.75; }
img { max-width: 100%; height: auto; background: white; border-radius: 0.4rem; }
"""

VIEWER = """
<div class="tools"><select id="case" aria-label="case"></select>
<button id="front">front</button><button id="left">left</button><button id="top">top</button>
<button id="closer" aria-label="closer">+</button><button id="farther" aria-label="farther">&minus;</button></div>
<div id="views"></div>LEGEND
<p class="note">Drag to turn; pinch to zoom, or click a view and turn the wheel; arrow keys, + and - do the same. All views move
together. R, A, S: the patient's right, front and head.</p><noscript><p>The meshes need JavaScript.</p></noscript>
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent), views = document.getElementById("views");
// Rows of a view: what of R, A, S (mm) goes right, up and towards the reader. From the front, the patient's right is on the left.
const VIEWS = { front: [-1, 0, 0, 0, 0, 1, 0, 1, 0], left: [0, -1, 0, 0, 0, 1, -1, 0, 0], top: [1, 0, 0, 0, 1, 0, 0, 0, 1] };
let turn = VIEWS.front.slice(), zoom = 1, shown = [], waiting = false;

function numbers(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
}

// Places in mm around the middle, normals, colours; made once for each mesh.
function unpack(view, one) {
  const places = numbers(view.places, Uint16Array), faces = numbers(view.faces, Uint16Array), n = places.length / 3;
  const at = new Float32Array(3 * n), normal = new Float32Array(3 * n), color = new Float32Array(3 * n);
  for (let i = 0; i < 3 * n; i++) at[i] = places[i] / 65535 - one.middle[i % 3];
  for (let f = 0; f < faces.length; f += 3) {
    const [a, b, c] = [3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2]], u = [0, 1, 2].map(k => at[b + k] - at[a + k]);
    const v = [0, 1, 2].map(k => at[c + k] - at[a + k]);
    for (let k = 0; k < 3; k++) {
      const x = u[(k + 1) % 3] * v[(k + 2) % 3] - u[(k + 2) % 3] * v[(k + 1) % 3];
      normal[a + k] += x; normal[b + k] += x; normal[c + k] += x;
    }
  }
  const distances = view.distances ? numbers(view.distances, Int8Array) : null;
  for (let i = 0; i < n; i++) {
    const length = Math.hypot(normal[3 * i], normal[3 * i + 1], normal[3 * i + 2]) || 1;
    const share = distances ? distances[i] / 127 : 0, end = share > 0 ? data.colors.outside : data.colors.inside;
    for (let k = 0; k < 3; k++) {
      normal[3 * i + k] /= length;
      color[3 * i + k] = distances ? data.colors.on[k] + Math.abs(share) * (end[k] - data.colors.on[k]) : data.colors.plain[k];
    }
  }
  return { n, at, normal, color, faces, on: new Float32Array(3 * n), lit: new Float32Array(3 * n) };
}

function choose(number) {
  const one = data.cases[number];
  views.textContent = "";
  shown = one.views.map(view => {
    const kinds = ["figure", "canvas", "figcaption", "b", "small"];
    const [figure, canvas, caption, name, scores] = kinds.map(kind => document.createElement(kind));
    name.textContent = view.name; scores.textContent = view.caption; canvas.tabIndex = 0;
    canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", view.name + ", " + view.caption);
    caption.append(name, scores); figure.append(canvas, caption); views.append(figure);
    listen(canvas);
    return { canvas, mesh: unpack(view, one) };
  });
  redraw();
}

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; shown.forEach(draw); });
}

function draw({ canvas, mesh }) {
  const size = Math.max(1, Math.round(canvas.clientWidth * Math.min(devicePixelRatio || 1, 2)));
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  const pixels = new Uint32Array(image.data.buffer), depth = new Float32Array(size * size).fill(-1e9);
  const scale = 0.8 * size * zoom, { at, normal, color, on, lit, faces } = mesh, t = turn;
  for (let i = 0; i < 3 * mesh.n; i += 3) {
    const x = at[i], y = at[i + 1], z = at[i + 2], u = normal[i], v = normal[i + 1], w = normal[i + 2];
    on[i] = size / 2 + scale * (t[0] * x + t[1] * y + t[2] * z);
    on[i + 1] = size / 2 - scale * (t[3] * x + t[4] * y + t[5] * z);
    on[i + 2] = t[6] * x + t[7] * y + t[8] * z;
    // A lamp at the reader's left shoulder, and a little light from everywhere.
    const right = t[0] * u + t[1] * v + t[2] * w, up = t[3] * u + t[4] * v + t[5] * w, near = t[6] * u + t[7] * v + t[8] * w;
    const light = 0.3 + 0.7 * Math.max(0, -0.35 * right + 0.4 * up + 0.85 * near);
    for (let k = 0; k < 3; k++) lit[i + k] = Math.min(255, color[i + k] * light);
  }
  for (let f = 0; f < faces.length; f += 3) fill(3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2], on, lit, pixels, depth, size);
  context.putImageData(image, 0, 0);
  axes(context, size);
}

function fill(a, b, c, on, lit, pixels, depth, size) {
  const ax = on[a], ay = on[a + 1], bx = on[b], by = on[b + 1], cx = on[c], cy = on[c + 1];
  const area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay);
  if (area >= 0) return;  // seen from behind, as the screen's y runs down
  const first = (...ends) => Math.max(0, Math.ceil(Math.min(...ends) - 0.5));
  const last = (...ends) => Math.min(size - 1, Math.floor(Math.max(...ends) - 0.5));
  const left = first(ax, bx, cx), right = last(ax, bx, cx), top = first(ay, by, cy), low = last(ay, by, cy);
  for (let y = top; y <= low; y++) for (let x = left; x <= right; x++) {
    const px = x + 0.5, py = y + 0.5;
    const p = ((bx - px) * (cy - py) - (cx - px) * (by - py)) / area, q = ((cx - px) * (ay - py) - (ax - px) * (cy - py)) / area;
    const r = 1 - p - q;
    if (p < -1e-4 || q < -1e-4 || r < -1e-4) continue;
    const z = p * on[a + 2] + q * on[b + 2] + r * on[c + 2], place = y * size + x;
    if (z <= depth[place]) continue;
    depth[place] = z;
    pixels[place] = 0xff000000 | (p * lit[a + 2] + q * lit[b + 2] + r * lit[c + 2]) << 16
      | (p * lit[a + 1] + q * lit[b + 1] + r * lit[c + 1]) << 8 | (p * lit[a] + q * lit[b] + r * lit[c]);
  }
}

function axes(context, size) {
  const unit = size / context.canvas.clientWidth, x = 30 * unit, y = size - 30 * unit, long = 18 * unit;
  context.lineWidth = 2 * unit; context.font = `bold ${11 * unit}px system-ui, sans-serif`;
  context.textAlign = "center"; context.textBaseline = "middle";
  ["R", "A", "S"].map((letter, k) => [turn[6 + k], letter, k]).sort((a, b) => a[0] - b[0]).forEach(([, letter, k]) => {
    context.strokeStyle = context.fillStyle = ["#d62728", "#2a9d3a", "#3d7be0"][k];
    context.beginPath(); context.moveTo(x, y); context.lineTo(x + long * turn[k], y - long * turn[3 + k]); context.stroke();
    context.fillText(letter, x + 1.4 * long * turn[k], y - 1.4 * long * turn[3 + k]);
  });
}

// Turns by two angles about the screen's own axes.
function rotate(dx, dy) {
  const [c, s, d, e] = [Math.cos(dx), Math.sin(dx), Math.cos(dy), Math.sin(dy)], t = turn, next = [];
  for (let k = 0; k < 3; k++) {
    const right = c * t[k] + s * t[6 + k], near = -s * t[k] + c * t[6 + k];
    next[k] = right; next[3 + k] = d * t[3 + k] - e * near; next[6 + k] = e * t[3 + k] + d * near;
  }
  turn = next;
  redraw();
}

function nearer(times) { zoom = Math.min(12, Math.max(0.4, zoom * times)); redraw(); }

function listen(canvas) {
  const fingers = new Map();
  const apart = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a[0] - b[0], a[1] - b[1]) || 1; };
  canvas.addEventListener("pointerdown", e => {
    canvas.setPointerCapture(e.pointerId);
    fingers.set(e.pointerId, [e.clientX, e.clientY]);
  });
  canvas.addEventListener("pointermove", e => {
    if (!fingers.has(e.pointerId)) return;
    const [x, y] = fingers.get(e.pointerId), before = fingers.size === 2 ? apart() : 0;
    fingers.set(e.pointerId, [e.clientX, e.clientY]);
    if (before) nearer(apart() / before);
    else if (fingers.size === 1) rotate((e.clientX - x) / 120, (e.clientY - y) / 120);
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, e => fingers.delete(e.pointerId));
  canvas.addEventListener("wheel", e => {
    if (document.activeElement !== canvas && !e.ctrlKey) return;  // else the page could not be scrolled over the views
    e.preventDefault(); nearer(Math.exp(-e.deltaY / 400));
  }, { passive: false });
  canvas.addEventListener("keydown", e => {
    const turns = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] }[e.key];
    if (turns) { e.preventDefault(); rotate(...turns); }
    if (e.key === "+" || e.key === "-") nearer(e.key === "+" ? 1.2 : 1 / 1.2);
  });
}

const select = document.getElementById("case");
data.cases.forEach((one, i) => select.add(new Option(one.name, i)));
select.addEventListener("change", () => choose(+select.value));
const onClick = (name, does) => document.getElementById(name).addEventListener("click", does);
for (const name of ["front", "left", "top"]) onClick(name, () => { turn = VIEWS[name].slice(); redraw(); });
onClick("closer", () => nearer(1.25));
onClick("farther", () => nearer(0.8));
addEventListener("resize", redraw);
choose(0);
rotate(0.45, 0.35);  // from the front, a little from above and from the side
"""
