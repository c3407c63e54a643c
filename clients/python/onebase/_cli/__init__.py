"""The subcommands of `onebase`. Each module has `run(argv) -> exit status`."""
