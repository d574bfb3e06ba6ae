"""What the site needs beyond Markdown: tutorials from notebooks, links to files outside docs/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook; the notebook itself stays beside it, to be downloaded."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text = page_of(json.loads(file.content_string), Path(file.src_uri).name)
            name = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show links to files of the repository that are no pages as their names.

    A link to a file that is not there stays as it is, and the strict build refuses it.
    """

    def shown(link: re.Match[str]) -> str:
        target = (ROOT / "docs" / page.file.src_uri).parent / link[2]
        inside = target.resolve().is_relative_to(ROOT / "docs")
        if inside or not target.exists():
            return link[0]
        path = target.resolve().relative_to(ROOT)
        return f"`{path}`" if link[1].strip("`") in str(path) else f"{link[1]} (`{path}`)"

    return _LINK.sub(shown, markdown)


def page_of(notebook: dict[str, Any], name: str) -> str:
    """Return a notebook as Markdown: its text, its code and what the code gave when it was run."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += filter(None, map(_output, cell["outputs"]))
    # Below the title, which comes first.
    parts.insert(1, f"*The notebook: [{name}]({name}).*")
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).strip()
        return f'<img alt="what the cell draws" src="data:image/png;base64,{picture}">'
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
