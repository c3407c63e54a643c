"""Training jobs: files in, trainer processes beside the engine, adapters out. The api's side."""
