"""What the kernels compile to, and what their machine code executes. Nothing here imports a question."""
