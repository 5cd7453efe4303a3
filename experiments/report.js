"use strict";

// Tables: a click on a head sorts by its column, a second one the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const missing = (cell) => cell.textContent.trim() === "-";
      const compare = (a, b) =>
        "value" in a.dataset && "value" in b.dataset
          ? a.dataset.value - b.dataset.value
          : a.textContent.localeCompare(b.textContent, "en", { numeric: true });
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const [a, b] = [one.cells[column], two.cells[column]];
        return missing(a) - missing(b) || (up ? 1 : -1) * compare(a, b);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Traces: video, slider and the line in the plot show the same step.
for (const figure of document.querySelectorAll(".trace")) {
  const video = figure.querySelector("video");
  const slider = figure.querySelector("input");
  const cursor = figure.querySelector(".cursor");
  const lines = [...figure.querySelectorAll("polyline")];
  const values = [...figure.querySelectorAll("[data-line]")];
  const rate = Number(figure.dataset.rate); // steps a second
  const show = (step) => {
    slider.value = step;
    cursor.setAttribute("x1", step);
    cursor.setAttribute("x2", step);
    const time = rate ? `, ${(step / rate).toFixed(2)} s` : "";
    figure.querySelector(".step").textContent = `step ${step}${time}`;
    for (const value of values) {
      const y = lines[value.dataset.line].points.getItem(step).y;
      value.textContent = String(Number(y.toPrecision(4)));
    }
  };
  const follow = () => {
    const last = Number(slider.max);
    show(Math.min(last, Math.floor(video.currentTime * rate + 1e-6)));
    if (!video.paused) requestAnimationFrame(follow);
  };
  slider.addEventListener("input", () => {
    show(Number(slider.value));
    if (video) video.currentTime = slider.value / rate;
  });
  if (video) for (const event of ["play", "seeked"]) video.addEventListener(event, follow);
  show(0);
}
