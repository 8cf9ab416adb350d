"""What `mkdocs build` does to pages that also have to read well in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
LINK = re.compile(r"(?<!!)\[(?P<text>[^]]+)\]\((?P<to>[^)#\s]+)(?P<anchor>#[^)]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to files of the repository that are no part of the site become the file's name.

    The site stands by itself, wherever it is put, so there is nothing there for them to lead to.
    """
    folder = (DOCS / page.file.src_uri).parent
    parts = FENCE.split(markdown)
    return "".join(part if n % 2 else LINK.sub(lambda m: _inside(m, folder), part) for n, part in enumerate(parts))


def _inside(link: re.Match[str], folder: Path) -> str:
    if "://" in link["to"] or (path := (folder / link["to"]).resolve()).is_relative_to(DOCS):
        return link[0]
    return f"{link['text']} (`{path.relative_to(DOCS.parent)}`)"
