(() => {
  "use strict";
  const traces = JSON.parse(document.getElementById("memplan").textContent).traces || [];
  const tip = document.getElementById("tip");
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const size = (nbytes) => {
    let power = 0;
    while (nbytes >= 1024 && power < units.length - 1) { nbytes /= 1024; power += 1; }
    return (power ? nbytes.toFixed(2) : nbytes) + " " + units[power];
  };
  const element = (name, words) => {
    const made = document.createElement(name);
    made.textContent = words;
    return made;
  };
  const last = (times, seconds) => {
    let low = 0, high = times.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (times[middle] <= seconds) { low = middle; } else { high = middle - 1; }
    }
    return low;
  };
  const fill = (trace, event) => {
    const rows = Object.entries(trace.series).filter(([, sizes]) => sizes[event]).reverse();
    const total = rows.reduce((sum, [, sizes]) => sum + sizes[event], 0);
    const time = (trace.times_s[event] * 1e3).toFixed(2) + " ms";
    tip.replaceChildren(element("b", size(total) + " at " + time + ", " + trace.phases[event]));
    for (const [name, sizes] of rows) {
      const row = element("span", ""), colour = element("i", "");
      colour.className = "swatch " + name.replaceAll(" ", "-");
      row.append(colour, element("em", name), size(sizes[event]));
      tip.append(row);
    }
  };
  for (const panel of document.querySelectorAll("g.panel")) {
    const trace = traces[Number(panel.dataset.trace)];
    const left = Number(panel.dataset.left), width = Number(panel.dataset.width);
    const cursor = panel.querySelector(".cursor"), sensor = panel.querySelector(".sensor");
    sensor.addEventListener("pointermove", (pointer) => {
      const matrix = panel.ownerSVGElement.getScreenCTM().inverse();
      const x = new DOMPoint(pointer.clientX, pointer.clientY).matrixTransform(matrix).x;
      const seconds = (x - left) / width * Number(panel.dataset.seconds);
      fill(trace, last(trace.times_s, seconds));
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.visibility = "visible";
      tip.hidden = false;
      const toLeft = pointer.clientX + tip.offsetWidth + 24 > window.innerWidth;
      tip.style.left = pointer.clientX + (toLeft ? -tip.offsetWidth - 16 : 16) + "px";
      const lowest = window.innerHeight - tip.offsetHeight - 8;
      tip.style.top = Math.max(8, Math.min(pointer.clientY + 12, lowest)) + "px";
    });
    sensor.addEventListener("pointerleave", () => {
      cursor.style.visibility = "hidden";
      tip.hidden = true;
    });
  }
})();
