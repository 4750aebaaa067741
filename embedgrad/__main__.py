"""`python -m embedgrad`: the command line."""

from embedgrad.cli.app import main

if __name__ == "__main__":
    main()
