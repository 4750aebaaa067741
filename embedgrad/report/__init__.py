"""Reports of finished, running and interrupted runs, as an HTML page that needs no network and as Markdown.

`read` reads a run's folder. `content` makes the report's content of strings and numbers, and `curves` its pictures.
`page` writes HTML with the pictures of `figures` (plotly); `markdown` writes Markdown with those of `pictures`
(matplotlib).
"""
