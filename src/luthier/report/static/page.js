// A report page: each figure's data becomes its chart; what stands in its place without a script is folded away.

document.documentElement.classList.add("js");
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const draw = figure.dataset.chart === "scatter" ? scatter : curves;
  draw(figure.querySelector(".plot"), spec);
}
for (const details of document.querySelectorAll("details.fallback")) details.open = false;
