"""Real servers on loopback, for tests, benchmarks and demonstrations.

Each module starts one kind of server as a context manager and knows nothing of the product: none
may import it. A server that cannot exist here raises `ServerMissing`; whether that skips or fails
is decided by the caller. Everything started is stopped when the program ends, however it ends.
"""
