"""The commands of the command line, one per module. A module is imported when its command runs."""
