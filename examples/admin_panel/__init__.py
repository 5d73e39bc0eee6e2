"""The row "admin panel": one short session cookie, one sign-in at a time."""
