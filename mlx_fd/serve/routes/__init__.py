"""The server's routes, one file for each kind; each has ``routes(service)``."""
