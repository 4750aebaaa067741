"""Reports of finished, running and interrupted runs: one HTML page that needs no network, and its Markdown twin.

`read` takes a run's folder apart; `content` says what a report says, in plain strings and numbers; `curves` which
pictures there are; `page` and `markdown` write the two forms, with `figures` (plotly) and `pictures` (matplotlib).
"""
