"""A head or a worker, put together and run. Who begins it calls `main.run`."""
