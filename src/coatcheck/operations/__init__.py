"""Use cases over the ports: login, resume, commit, rotate, revoke."""
