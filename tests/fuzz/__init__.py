"""Fuzzers, run by hand: `python -m tests.fuzz.fuzz_access_token -max_total_time=60`. They need `atheris`."""
