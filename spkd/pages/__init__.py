"""Elements of HTML pages: text, tables, figures."""
