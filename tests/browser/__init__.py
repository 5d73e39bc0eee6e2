"""The server as people meet it: a real process, a real browser."""
