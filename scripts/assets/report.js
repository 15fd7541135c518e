"use strict";
const record = JSON.parse(document.getElementById("record").textContent);
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const lines = record.charts[svg.dataset.chart];
  if (!lines) continue;
  const [x0, x1, left, right] = svg.dataset.x.split(" ").map(Number);
  const [y0, y1, top, bottom] = svg.dataset.y.split(" ").map(Number);
  const width = svg.viewBox.baseVal.width, log = svg.dataset.log === "1";
  const scale = (v) => (log ? Math.log10(v) : v);
  const box = document.createElement("div");
  const cross = document.createElementNS(svg.namespaceURI, "line");
  box.className = "read"; box.hidden = true; cross.setAttribute("class", "cross");
  svg.parentElement.style.position = "relative"; svg.parentElement.append(box);
  const leave = () => { box.hidden = true; cross.remove(); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), unit = frame.width / width;
    const px = (event.clientX - frame.left) / unit, py = (event.clientY - frame.top) / unit;
    const step = x0 + (px - left) / (right - left) * (x1 - x0);
    let best = null;
    for (const line of lines) for (const [x, y] of line.points) {
      if (y === null) continue;
      const at = bottom - (scale(y) - y0) / (y1 - y0) * (bottom - top);
      const far = Math.abs(x - step) / (x1 - x0 || 1) * 40 + Math.abs(at - py) / (bottom - top);
      if (!best || far < best.far) best = { far, x, y, name: line.name };
    }
    if (!best) return leave();
    const sx = left + (best.x - x0) / (x1 - x0 || 1) * (right - left);
    for (const [k, v] of [["x1", sx], ["x2", sx], ["y1", top], ["y2", bottom]]) cross.setAttribute(k, v);
    svg.append(cross);
    box.hidden = false;
    box.textContent = `${best.name}: ${Number(best.y.toPrecision(5))} at step ${best.x}`;
    box.style.top = "0";
    box.style.left = Math.max(0, Math.min(sx * unit, frame.width - box.offsetWidth)) + "px";
  });
}
for (const head of document.querySelectorAll("th[data-sort]")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], at = head.cellIndex;
    const down = head.dataset.sort = head.dataset.sort === "up" ? "down" : "up";
    const value = (row) => { const t = row.cells[at].textContent; return t === "" || isNaN(+t) ? t : +t; };
    const rows = [...body.rows].sort((a, b) => {
      const [u, v] = [value(a), value(b)];
      return typeof u === typeof v ? (u < v ? -1 : u > v ? 1 : 0) : typeof u === "number" ? -1 : 1;
    });
    body.append(...(down === "down" ? rows.reverse() : rows));
  });
}
