"""What the questions share. Nothing here imports a question or `bench.machine_code`."""
