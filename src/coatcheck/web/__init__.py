"""Headers in, headers out. Sees no store and no operation."""
