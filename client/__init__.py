"""The Python client: the gRPC stubs wrapped for people."""
