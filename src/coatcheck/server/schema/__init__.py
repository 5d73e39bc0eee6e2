"""The server's own tables: accounts, one-time links and the audit log; one folder a dialect, numbered SQL files.

`coatcheck.stores.migrations` says what a file looks like and when a database needs it. A released file must never be
changed.
"""
