"""The browser client: its build, and its behaviour in a real Chromium."""
