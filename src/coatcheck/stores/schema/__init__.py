"""The stores' tables: one folder a dialect, numbered SQL files that are never changed once released.

`coatcheck.stores.migrations` says what a file looks like and when a database needs it.
"""
