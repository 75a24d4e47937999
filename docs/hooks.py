"""What mkdocs does beside its pages: the README as the front page, files of the repository, tables from the code.

- `index.md` is the README.
- A link from a page to a file outside of `docs/` takes the file into the site, below `repository/`.
- `<!-- fields: package.Config -->` becomes the table of a configuration's fields.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import posixpath
import re
import warnings
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository/"
LINK = re.compile(r"(\]\(|\bsrc(?:set)?=\")(?!https?:|#|mailto:)([^)#\s\"]+)((?:#[^)\s]*)?[)\"])")
FIELDS = re.compile(r"<!-- fields: (\w+)\.(\w+) -->")
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": f"{OUTSIDE}CHANGELOG.md",
    "CONTRIBUTING.md": f"{OUTSIDE}CONTRIBUTING.md",
}


def in_repository(src_uri: str) -> str:
    """Path of a page's source in the repository."""
    known = {uri: path for path, uri in PAGES.items()}
    return known.get(src_uri) or (src_uri.removeprefix(OUTSIDE) if src_uri.startswith(OUTSIDE) else f"docs/{src_uri}")


def in_site(path: str) -> str:
    """Source of a file of the repository within the site."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path)


def targets(src_uri: str, text: str) -> list[str]:
    """Files of the repository outside of `docs/` that a page links to."""
    folder = posixpath.dirname(in_repository(src_uri))
    linked = (_file(posixpath.join(folder, match[2])) for match in LINK.finditer(text))
    return [path for path in linked if not path.startswith("docs/")]


def _file(path: str) -> str:
    """What a link leads to: of a folder its README."""
    path = posixpath.normpath(path)
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, and what pages link to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=os.fspath(ROOT / path)))
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for path in targets(page.src_uri, page.content_string):
            if (ROOT / path).is_file() and files.get_file_from_path(in_site(path)) is None:
                files.append(added := File.generated(config, in_site(path), abs_src_path=os.fspath(ROOT / path)))
                pages += [added] if path.endswith(".md") else []
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the places that code fills, and point links to where the site has the files."""
    text = FIELDS.sub(lambda match: fields_table(_public(match[1], match[2])), text)
    source = page.file.src_uri
    folder = posixpath.dirname(in_repository(source))

    def moved(match: re.Match[str]) -> str:
        path = _file(posixpath.join(folder, match[2]))
        return match[1] + posixpath.relpath(in_site(path), posixpath.dirname(source) or ".") + match[3]

    return LINK.sub(moved, text)


def fields_table(config: type[Any]) -> str:
    """Name, type, default and help of each field, those that all PEFT methods have at the end."""
    own = [field for field in dataclasses.fields(config) if field.name in config.__annotations__]
    rest = [f for f in dataclasses.fields(config) if f not in own and f.init and f.metadata.get("help")]
    lines = ["| field | default | |", "|---|---|---|"]
    for field in own + rest:
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        text = " ".join(field.metadata.get("help", "").split()).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{field.name}` | {default} | {text} |")
    return "\n".join(lines)


def _public(package: str, name: str) -> Any:
    """A public name of ours, imported without the warnings of other packages."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it names kernels that a CPU does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(package), name)
