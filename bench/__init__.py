"""Benchmarks: each answers one question, reports, and gates nothing."""
