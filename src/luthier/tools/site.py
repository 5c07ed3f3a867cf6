"""A hook of mkdocs: the navigation of the docs site, with the methods by kind and family."""

from __future__ import annotations

from typing import Any

from luthier import registry
from luthier.tools.docs import families

GUIDES = {
    "Start here": "index.md",
    "A real model, a real day": "real_model.md",
    "The idea": "idea.md",
    "Recipes": "recipes.md",
    "Data": "data.md",
    "Chat templates": "templates.md",
    "Images": "vision.md",
    "Forgetting and benchmarks": "measuring.md",
    "Comparing": "compare.md",
    "Searching": "search.md",
    "Several processes": "processes.md",
    "After tuning": "after_tuning.md",
    "Studio": "studio.md",
    "Serving": "serve.md",
    "Environments": "environments.md",
    "Python": "python.md",
    "Programs of prompts": "programs.md",
    "Troubleshooting": "troubleshooting.md",
    "Trust": "trust.md",
    "Speed": "speed.md",
    "Toy tasks": "toy.md",
}
BACKGROUND = {
    "Tuners that surveys name": "tuners.md",
    "Compared with TRL": "trl.md",
    "Changes in other libraries": "compat.md",
    "Published recipes": "published.md",
    "Papers": "papers.md",
    "Papers that tune nothing": "adjacent.md",
    "Claims": "claims.md",
}


WORKER = "https://unpkg.com/iframe-worker/shim"  # what the theme loads for search in pages opened as files


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Called by mkdocs with each page's HTML: the site's own script takes the place of one from elsewhere."""
    from mkdocs.utils import get_relative_url

    return output.replace(WORKER, get_relative_url("javascripts/file_worker.js", page.url))


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """Called by mkdocs with the HTML of what is no page, such as the one for unknown addresses."""
    return output_content.replace(WORKER, "/javascripts/file_worker.js")


def on_config(config: Any) -> Any:
    """Called by mkdocs with its configuration, before it reads any page."""
    config.nav = [
        {"Guides": entries(GUIDES)},
        {"Methods": ["methods/index.md", *method_entries()]},
        {"Python API": "api.md"},
        {"Background": entries(BACKGROUND)},
    ]
    return config


def entries(pages: dict[str, str]) -> list[Any]:
    """Titles and pages as mkdocs lists them."""
    return [{title: page} for title, page in pages.items()]


def method_entries() -> list[Any]:
    """A section for each kind, with its index page, its families and their methods."""
    sections = []
    for kind, about in registry.KINDS.items():
        by_family = families(kind)
        if not by_family:
            continue
        listed: list[Any] = [{"Overview": f"methods/{kind}.md"}]
        for family, cards in by_family.items():
            pages = [{card.name: f"methods/{kind}/{card.name}.md"} for card in cards]
            if len(by_family) == 1:
                listed += pages
            else:
                listed.append({family: pages})
        sections.append({about.title.partition(":")[0]: listed})
    return sections
