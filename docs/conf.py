"""Sphinx: ``make docs``. Pages are Markdown; the reference comes from docstrings, the gallery from examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import fusedopt

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs" / "gallery"

project, author, release = "fusedopt", "the fusedopt developers", fusedopt.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
html_theme = "furo"
html_title = f"fusedopt {release}"
html_copy_source = False
html_show_copyright = False
nitpicky = False
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures are short; the types are in the text and in the stubs
napoleon_use_ivar = True
napoleon_custom_sections = [("Options", "params_style")]

# Links that lead to files of the repository, for readers there; on the site they lead to these pages.
PAGES = {
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../bench/README.md": "benchmarks.md",
    "../examples": "gallery/index.md",
    "bench/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
}


def follow(app: Any, page: str, source: list[str]) -> None:
    """Makes links to files of the repository lead to pages of the site."""
    source[0] = links(source[0])


def follow_included(app: Any, path: Path, parent: str, source: list[str]) -> None:
    """The same in an included file."""
    source[0] = links(source[0])


def links(text: str) -> str:
    def led(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        target = PAGES.get(target, target)
        here = not target.startswith("..") and any(
            (ROOT / "docs" / folder / target).exists() for folder in ("", "reference", "gallery")
        )
        return f"[{label}]({target}{anchor})" if here else label  # files that the site does not have

    return re.sub(r"(?<!!)\[([^]]+)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)", led, text)


def skip(app: Any, what: str, name: str, value: Any, skipped: bool, options: Any) -> bool | None:
    """Leaves out methods that scikit-learn generates."""
    return True if "request" in name or name == "get_metadata_routing" else None


def make_gallery(app: Any) -> None:
    """Runs the examples that have changed, in their short form, for their pictures and output."""
    GALLERY.mkdir(exist_ok=True)
    entries = []
    for script in sorted((ROOT / "examples").glob("*.py")):
        folder, page = GALLERY / script.stem, GALLERY / f"{script.stem}.md"
        if not page.exists() or page.stat().st_mtime < script.stat().st_mtime:
            words = [sys.executable, str(script), "--quick", "--output", str(folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
            page.write_text(example(script, folder, done.stdout))
        entries.append(script.stem)
    cards = "\n".join(f":::{{grid-item-card}} {card(name)}\n:::\n" for name in entries)
    toctree = "\n".join(entries)
    (GALLERY / "index.md").write_text(
        "# Gallery\n\nExamples with their pictures, made with `--quick`. "
        "Each is one file of `examples/`.\n\n"
        f"::::{{grid}} 1 2 2 3\n:gutter: 2\n\n{cards}\n::::\n\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"
    )


def title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def card(name: str) -> str:
    pictures = sorted((GALLERY / name).glob("*.png"))
    image = f"\n:img-top: {name}/{pictures[0].name}" if pictures else ""
    return f"{title(name)}\n:link: {name}\n:link-type: doc{image}"


def example(script: Path, folder: Path, output: str) -> str:
    text = script.read_text()
    summary = text.split('"""')[1].strip()
    parts = [f"# {title(script.stem)}", summary]
    for picture in sorted(folder.glob("*.png")):
        parts.append(f"![{title(picture.stem.replace('-', '_'))}]({folder.name}/{picture.name})")
    parts.append(f"## Output\n\n```text\n{output.rstrip()}\n```")
    parts.append(f"## examples/{script.name}\n\n```python\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def setup(app: Any) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    app.connect("builder-inited", make_gallery)
    app.connect("source-read", follow)
    app.connect("include-read", follow_included)
    app.connect("autodoc-skip-member", skip)
