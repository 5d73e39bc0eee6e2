"""Digest, seal, sign, verify. Knows no session and no policy."""
