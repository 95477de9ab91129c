// Interaction only: tooltips, switches in legends, sorting, theme. The page is complete without it.
"use strict";
(() => {
  const NEAR = 32; // px from the pointer to a figure
  const tip = document.getElementById("tip");
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const hidden = (node) => node.closest(".series")?.classList.contains("off");

  // --- tooltips ---------------------------------------------------------------------------------
  let lit = null;
  function show(words, x, y, node) {
    lit?.classList.remove("near");
    lit = node;
    node?.classList.add("near");
    tip.textContent = words;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), innerWidth - box.width - 8);
    const above = y - box.height - 12;
    tip.style.transform = `translate(${left}px, ${above > 8 ? above : y + 18}px)`;
  }
  function hide() {
    lit?.classList.remove("near");
    lit = null;
    tip.hidden = true;
  }
  function middle(node) {
    const box = (node.querySelector(".m, .bar, .cell") || node).getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  }
  // Where the pointer shows nothing, the point that the keyboard chose still does.
  function rest() {
    const pt = document.activeElement?.closest(".pt:focus-visible");
    if (pt) show(pt.dataset.tip, ...middle(pt), pt);
    else hide();
  }
  function targets(chart) {
    const found = all(".pt", chart).filter((pt) => !hidden(pt)).map((pt) => {
      const [x, y] = middle(pt);
      return { x, y, node: pt, words: pt.dataset.tip };
    });
    const place = chart.getScreenCTM();
    for (const line of all(".trace", chart)) {
      if (hidden(line)) continue;
      const xs = line.dataset.x.split(" ");
      const ys = line.dataset.y.split(" ");
      [...line.points].forEach((point, i) => {
        const at = point.matrixTransform(place);
        const said = line.dataset.said.replace("{x}", xs[i]).replace("{y}", ys[i]);
        found.push({ x: at.x, y: at.y, node: null, words: `${line.dataset.name}, ${said}` });
      });
    }
    return found;
  }
  for (const chart of all(".chart")) {
    for (const title of all("title", chart)) { // else the browser shows a second tooltip
      const pt = title.parentNode;
      pt.dataset.tip = title.textContent;
      pt.setAttribute("aria-label", title.textContent.replace("\n", "; "));
      title.remove();
    }
    let known = null;
    const point = (event) => {
      const under = event.target.closest(".pt"); // bars and cells may be larger than what is near their middle
      if (under) return show(under.dataset.tip, ...middle(under), under);
      known ??= targets(chart);
      let best = null;
      let least = NEAR;
      for (const target of known) {
        // a marker wins over the bare line beside it
        const away = Math.hypot(target.x - event.clientX, target.y - event.clientY) + (target.node ? 0 : 6);
        if (away < least) [best, least] = [target, away];
      }
      if (best) show(best.words, best.x, best.y, best.node);
      else rest();
    };
    chart.addEventListener("pointerenter", () => { known = null; });
    chart.addEventListener("pointermove", point);
    chart.addEventListener("pointerdown", (event) => { known = null; point(event); });
    chart.addEventListener("pointerleave", rest);
    chart.addEventListener("focusin", (event) => {
      const pt = event.target.closest(".pt");
      if (pt) show(pt.dataset.tip, ...middle(pt), pt);
    });
    chart.addEventListener("focusout", hide);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const points = all(".pt", chart).filter((pt) => !hidden(pt));
      const next = points[points.indexOf(document.activeElement) + step];
      next?.focus();
    });
  }
  addEventListener("scroll", rest, { passive: true });

  // --- legends ----------------------------------------------------------------------------------
  for (const key of all(".legend button")) {
    key.disabled = false;
    key.setAttribute("aria-pressed", "true");
    key.title = "Show or hide";
    key.addEventListener("click", () => {
      const on = key.getAttribute("aria-pressed") !== "true";
      key.setAttribute("aria-pressed", String(on));
      for (const series of all(".series", key.closest("figure"))) {
        if (series.dataset.series === key.dataset.series) series.classList.toggle("off", !on);
      }
    });
  }

  // --- tables -----------------------------------------------------------------------------------
  for (const table of all("table")) {
    if (table.tBodies[0].rows.length < 3) continue;
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => {
          const cell = row.cells[column];
          return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
        };
        const figures = head.classList.contains("num");
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => {
          if (!figures) return a.cells[column].textContent.localeCompare(b.cells[column].textContent) * (down ? -1 : 1);
          const [x, y] = [value(a), value(b)];
          if (x === null || y === null) return (x === null) - (y === null); // blanks last
          return (x - y) * (down ? -1 : 1);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // --- theme ------------------------------------------------------------------------------------
  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const current = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  const label = () => { theme.textContent = current() === "dark" ? "Light" : "Dark"; };
  theme.hidden = false;
  theme.setAttribute("aria-label", "Switch between light and dark");
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = current() === "dark" ? "light" : "dark";
    label();
  });
  dark.addEventListener("change", label);
  label();

  // --- folding: it prints as it stands ------------------------------------------------------------
  const unfold = document.getElementById("unfold");
  const folded = () => all("details:not([open])");
  unfold.hidden = false;
  unfold.addEventListener("click", () => {
    const open = folded().length > 0;
    all("details").forEach((part) => { part.open = open; });
  });
  const offer = () => { unfold.textContent = folded().length > 0 ? "Unfold all" : "Fold all"; };
  addEventListener("toggle", offer, true);
  offer();
})();
