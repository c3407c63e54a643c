"""Parts shared by the benchmark and the soak. Run `serve.py` and `soak.py`, one folder up."""
