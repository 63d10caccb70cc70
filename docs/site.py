"""Pages of the site from files outside docs/: README, contributing, changes, and the docstrings of each package."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the packages in the navigation."""
    for entry in config.nav or []:
        if entry.get("Modules"):
            entry["Modules"] = [{name: f"api/{name}.md"} for name in _modules()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for uri, name in PAGES.items():
        files.append(File.generated(config, uri, content=_for_site((ROOT / name).read_text())))
    for name in _modules():
        content = f"# vit_scaling.{name}\n\n::: vit_scaling.{name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=content))
    return files


def _modules() -> list[str]:
    """Returns the packages, and the schema of an experiment."""
    packages = sorted(path.parent.name for path in (ROOT / "vit_scaling").glob("*/__init__.py"))
    return ["config", *packages]


def _for_site(text: str) -> str:
    """Returns Markdown whose links lead from docs/; those to files that are no page become their text."""
    for uri, name in PAGES.items():
        text = text.replace(f"]({name})", f"]({uri})")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[([^\]]+)\]\((?!http|#)[\w/]+\.(?:py|cff)\)", r"\1", text)
