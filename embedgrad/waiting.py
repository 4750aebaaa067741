"""How idle OpenMP threads wait; imported by the programs of this project before torch, which starts OpenMP.

By default they spin, and a thread that spins takes the core from the one it waits for as soon as another process wants
that core: beside one busy process, decoding on two cores took three to seven times as long. Asleep, they cost
microseconds. A program of your own decides for itself.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
