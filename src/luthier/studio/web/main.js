// Which page is shown: the address says so, so that a reload and a second tab find it again.

import { announce, ask, fill, h } from "./dom.js";
import { meters } from "./machine.js";
import { begin } from "./new.js";
import { run } from "./run.js";
import { runs } from "./runs.js";
import { talk } from "./talk.js";

const PAGES = { new: begin, runs, run, talk };
let leaving = new AbortController();
let first = true;

async function show() {
  const [page, rest] = (location.hash.slice(1) || await start()).split(/\/(.*)/s);
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const main = document.getElementById("main");
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash === `#${page}` || page === "run" && link.hash === "#runs";
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  main.dataset.page = page;
  try {
    const content = await (PAGES[page] ?? begin)(decodeURIComponent(rest ?? ""), signal);
    if (signal.aborted) return;
    fill(main, content);
    const title = main.querySelector("h1");
    document.title = `${title?.textContent ?? "studio"} · luthier`;
    window.scrollTo(0, 0);
    if (!first && title) { title.tabIndex = -1; title.focus({ preventScroll: true }); }
    first = false;
  } catch (error) {
    if (signal.aborted) return;
    fill(main, h("h1", {}, "This page cannot be shown"), h("p", { class: "complaint", role: "alert" }, error.message), h("p", {}, h("a", { href: "#runs" }, "All runs")));
    announce(error.message);
  }
}

/** Where one begins: at the runs, where there are any. */
async function start() {
  const all = await ask("/api/runs").catch(() => []);
  return all.length ? "runs" : "new";
}

document.querySelector(".skip").addEventListener("click", (e) => { e.preventDefault(); document.getElementById("main").focus(); }); // the address stays the page's
window.addEventListener("hashchange", show);
meters(document.getElementById("machine"));
show();
ask("/api/settings/recipe/recipe").catch(() => {}); // so that what reads rows is awake when it is needed
