"use strict";
(() => {
  const root = document.documentElement;
  root.dataset.violations = "0";
  document.addEventListener("securitypolicyviolation", () => { root.dataset.violations = String(+root.dataset.violations + 1); });
  const all = (selector, from = document) => Array.from(from.querySelectorAll(selector));

  // Figures: colours are tokens such as "@worn"; each is the CSS variable of that name.
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const config = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
  const resolve = (value, style) => {
    if (typeof value === "string") return /^@[a-z-]+$/.test(value) ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.map((v) => resolve(v, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v, style)]));
  };
  const draw = () => {
    const style = getComputedStyle(root);
    let drawn = 0;
    const jobs = all("[data-figure]").map((div) => {
      const figure = resolve(figures[div.dataset.figure], style);
      return Plotly.react(div, figure.data, figure.layout, config).then(() => { drawn += 1; });
    });
    Promise.all(jobs).then(() => { root.dataset.figures = String(drawn); });
  };
  draw();

  // Light and dark.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", draw);
  document.querySelector("[data-theme-toggle]").addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    draw();
  });

  // Covered text: `inert` blurs it (CSS), hides it from readers and keeps it out of searches.
  const show = (box, shown) => {
    all(".veil", box).forEach((veil) => { veil.inert = !shown; });
    const button = box.querySelector(".reveal");
    button.setAttribute("aria-pressed", String(shown));
    button.textContent = shown ? "Hide" : "Show";
    box.classList.toggle("shown", shown);
  };
  const boxes = all("[data-box]");
  boxes.forEach((box) => box.addEventListener("click", (event) => {
    const shown = box.classList.contains("shown");
    if (event.target.closest(".reveal")) show(box, !shown);
    else if (!shown) show(box, true);
  }));
  const every = document.querySelector("[data-reveal-all]");  // only where there is hidden text
  every?.addEventListener("click", () => {
    const shown = every.getAttribute("aria-checked") !== "true";
    every.setAttribute("aria-checked", String(shown));
    boxes.forEach((box) => show(box, shown));
  });

  // Filter.
  const filters = all("[data-filter]");
  filters.forEach((button) => button.addEventListener("click", () => {
    filters.forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
    all("[data-status]").forEach((card) => { card.hidden = button.dataset.filter !== "" && card.dataset.status !== button.dataset.filter; });
  }));

  // Copy; where the clipboard is closed the lines are selected instead.
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const code = button.closest(".snippet").querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));
})();
