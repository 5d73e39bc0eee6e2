"""The row "bank": a session bound to the place it was opened at."""
