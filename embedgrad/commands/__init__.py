"""What the command line does, one command a file; imported only when its command runs."""
