"""What do the kernels compile to (`--static`), and what does their machine code execute (`--executed`)?"""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--static", action="store_true", help="compile for sm_80, sm_90, sm_100 and gfx942, and read it")
    which.add_argument("--executed", action="store_true", help="run the gfx942 code in an emulator, and count")
    parser.add_argument("--only", metavar="TEXT", default="", help="only specimens or trials whose name contains TEXT")
    parser.add_argument("--arch", action="append", metavar="ARCH", help="only this target (repeat for several)")
    parser.add_argument("--dtype", action="append", metavar="TYPE", help="only bfloat16, float16 or float32 (repeat)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    if args.static:
        from . import kernels_static

        return kernels_static.report(args)
    from . import kernels_executed

    return kernels_executed.report(args)
