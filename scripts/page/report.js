// What is under the pointer, in numbers. The page reads without it.
"use strict";
{
  const numbers = JSON.parse(document.getElementById("numbers").textContent);
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  const at = ([low, high, log], v) =>
    log ? (Math.log10(v) - Math.log10(low)) / (Math.log10(high) - Math.log10(low)) : (v - low) / (high - low || 1);
  const said = (v) => (Number.isInteger(v) ? v.toLocaleString("en") : Number(v.toPrecision(5)).toString());

  function nearest(series, chart, x, y) {
    let best = -1, least = Infinity;
    for (let i = 0; i < series.x.length; i++) {
      const dx = at(chart.x, series.x[i]) - x;
      const far = chart.near ? Math.hypot(dx, 1 - at(chart.y, series.y[i]) - y) : Math.abs(dx);
      if (far < least) [best, least] = [i, far];
    }
    return [best, least];
  }

  function lines(chart, x, y) {
    const found = chart.series.map((s) => [s, ...nearest(s, chart, x, y)]).filter(([, i]) => i >= 0);
    const least = Math.min(...found.map(([, , far]) => far));
    return found
      .filter(([, , far]) => (chart.near ? far === least : far < least + 0.03))
      .map(([s, i]) => `${s.names ? s.names[i] : s.name || "value"}  ${said(s.y[i])}  at ${said(s.x[i])}`);
  }

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = numbers[figure.dataset.chart], plot = figure.querySelector(".plot");
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      tip.textContent = lines(chart, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height).join("\n");
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      tip.style.left = `${Math.max(4, left) + scrollX}px`;
      tip.style.top = `${event.clientY + 16 + scrollY}px`;
    });
    plot.addEventListener("pointerleave", () => (tip.textContent = ""));
  }
}
