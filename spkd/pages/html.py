"""Elements of self-contained HTML pages, readable on a phone and on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

MOST_COLUMNS = 3  # most columns that fit on a phone
STYLE = """
:root { color-scheme: light; --paper: #fff; --ink: #222; --soft: #555; --line: #e4e4e4; --block: #f5f5f5 }
@media screen and (prefers-color-scheme: dark) {
:root { color-scheme: dark; --paper: #15181c; --ink: #e4e7ea; --soft: #a7afb8; --line: #3a4047; --block: #22272d } }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
color: var(--ink); background: var(--paper) }
h1 { font-size: 1.55rem; line-height: 1.25; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem;
overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: collapse; min-width: 40% } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600 } tr > :first-child { overflow-wrap: anywhere; min-width: 7.5rem }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
table.facts th { white-space: nowrap; font-weight: 400; color: var(--soft) } table.facts td { overflow-wrap: anywhere }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
align-items: start } .figures div { max-width: 34rem } .figures svg { width: 100%; height: auto; fill: currentColor }
.note { color: var(--soft) } audio { height: 2rem; width: 11rem; max-width: 100% }
pre { overflow-x: auto; background: var(--block); padding: .7rem .9rem; border-radius: 4px; font-size: .85rem }
.command { display: flex; gap: .5rem; align-items: center } .command pre { flex: 1; min-width: 0; margin: .3rem 0 }
code { font-size: .9em; overflow-wrap: anywhere }
@media (max-width: 40rem) { body { font-size: 15px; margin: 1rem auto } th, td { padding-right: .7rem }
table.many, table.many tbody { display: block } table.many tr:has(> th) { display: none }
table.many tr { display: block; padding: .4rem 0 } table.many tr > :first-child { font-weight: 600 }
table.many td { display: flex; gap: 1rem; border: 0; padding: .1rem 0; text-align: left; white-space: normal }
table.many td::before { content: attr(data-head); flex: 0 0 8rem; color: var(--soft) }
table.many tr { border-bottom: 1px solid var(--line) } table.many td { overflow-wrap: anywhere } }
@media print { body { max-width: none; margin: 0; font-size: 10pt } h2 { break-after: avoid }
table, svg, figure { break-inside: avoid } audio, button { display: none } .wide { overflow: visible } }
"""


class Html(str):
    """HTML, which is not escaped again."""


def _cell(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", words: Sequence[int] = (0,)
) -> str:
    """A table. On a phone, each row of a table with many columns is shown as a list.

    Args:
        words: positions of the columns with words; the others are set as numbers.
    """
    many = len(header) > MOST_COLUMNS

    def cells(row: Sequence[object], tag: str) -> str:
        heads = [f' data-head="{escape(name)}"' if many and tag == "td" else "" for name in header]
        return "".join(
            f"<{tag}{'' if i in words else ' class=n'}{head}>{_cell(c)}</{tag}>"
            for i, (c, head) in enumerate(zip(row, heads, strict=True))
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    kind = " class=many" if many else ""
    return f'<div class="wide"><table{kind}>{title}<tr>{cells(header, "th")}</tr>{body}</table></div>'


def facts(pairs: Mapping[str, object]) -> str:
    """A table with a name and a value in each row."""
    body = "".join(f"<tr><th>{escape(k)}</th><td>{_cell(v)}</td></tr>" for k, v in pairs.items())
    return f'<div class="wide"><table class="facts">{body}</table></div>'


def figures(*drawings: str) -> str:
    """<svg> elements next to one another, as far as the width allows."""
    return f'<div class="figures">{"".join(f"<div>{drawing}</div>" for drawing in drawings)}</div>'


def note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="note">{escape(text)}</p>'


def sentences(texts: Sequence[str]) -> str:
    """A list with bullets."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def command(text: str) -> str:
    """A command, with a button to copy it."""
    copy = "navigator.clipboard.writeText(this.previousElementSibling.textContent)"
    return f'<div class="command"><pre>{escape(text)}</pre><button onclick="{copy}">copy</button></div>'


def heading(text: str, anchor: str = "") -> str:
    """A heading.

    Args:
        anchor: name for a `link` within the page; "" for none.
    """
    return f"<h2{f' id={anchor}' if anchor else ''}>{escape(text)}</h2>"


def link(address: str, text: str) -> Html:
    """A link, for a cell of a table."""
    return Html(f'<a href="{escape(address)}">{escape(text)}</a>')


def code(text: str) -> str:
    """A block of text in a fixed-width font."""
    return f"<pre>{escape(text)}</pre>"


def page(title: str, *parts: str) -> str:
    """A whole HTML page."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
