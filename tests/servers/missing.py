"""What is said when a real part is not installed here; never used for a part that is broken."""


class ServerMissing(Exception):
    """No binary of this server was found; the message says where it was looked for."""
