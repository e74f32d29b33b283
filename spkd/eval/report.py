"""The HTML report: one self-contained page that says how each number came about."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .6rem 0 } th, td { padding: .3rem .9rem .3rem 0; text-align: left;
border-bottom: 1px solid #e4e4e4; vertical-align: top } td.n, th.n { text-align: right }
.figures { display: flex; flex-wrap: wrap; gap: 1rem } .figures svg { max-width: 100%; height: auto }
.note { color: #555 }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns after the first are set as numbers."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i else ''}>{escape(str(c))}</{tag}>" for i, c in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(header, 'th')}</tr>{body}</table>"


def facts(pairs: dict[str, object]) -> str:
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in pairs.items())
    return f"<table>{body}</table>"


def figures(*drawings: str) -> str:
    return f'<div class="figures">{"".join(drawings)}</div>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def page(title: str, *parts: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
