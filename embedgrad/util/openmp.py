"""Makes idle OpenMP threads sleep. The programs of this project import it before torch, which starts OpenMP.

By default idle OpenMP threads spin. When another process uses one of the cores, a spinning thread takes the core from
the thread it waits for: beside one busy process, decoding on two cores took three to seven times as long. Waking a
sleeping thread costs microseconds. A program that uses embedgrad as a library makes its own choice.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
