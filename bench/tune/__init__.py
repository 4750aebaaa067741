"""`python -m bench tune`: which launch parameters are fastest on this GPU, among candidates that are right there.

candidates.py   what is tried: per kernel the parameters, and the shapes they are compared on
clock.py        seconds of one call
search.py       one kernel: compile, check, time, halve
command.py      the command line, and the file of rows that comes out
"""
