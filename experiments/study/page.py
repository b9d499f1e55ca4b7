"""A study as one HTML page that needs no other file."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
figure { margin: 1rem 0 }
img { max-width: 100% }
pre { background: #f5f5f5; padding: .7rem; overflow-x: auto }
"""


class Page:
    """Parts of a page, in their order; whatever is given as text is shown as it is."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def table(self, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
        rows = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
        rows += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
        self._parts.append("<table>" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "</table>")

    def items(self, texts: Sequence[str]) -> None:
        self._parts.append("<ul>" + "\n".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")

    def image(self, svg: Path, caption: str) -> None:
        """Embed an SVG file."""
        data = base64.b64encode(svg.read_bytes()).decode()
        source = f"data:image/svg+xml;base64,{data}"
        self._parts.append(
            f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        )

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """The whole page."""
        title, parts = escape(self._title), "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{parts}\n</body>\n</html>\n"
        )
