"""What `bench gpu` measures, one section a module."""
