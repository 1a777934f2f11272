"""The command line: one module per family of commands. `parser` wires them, `main` maps endings to exit codes."""
