"""Is a row of the launch table right on this machine? Cases for every kernel, and their check against the reference.

    case.py                                 what a case is
    rowwise.py, attention.py, products.py   cases by kernel, at any size
    check.py                                one case under given launch parameters: right, wrong, or not to be run
    compiled.py                             compiles many launches at once, and says which spill or do not fit
    table.py                                every row that an architecture has, checked

`embedgrad doctor --device cuda` checks the rows that are shipped; `python -m bench tune` checks and times candidates.
"""
