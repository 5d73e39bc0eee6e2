"""Endpoints, pages and composition; the only layer that chooses a store."""
