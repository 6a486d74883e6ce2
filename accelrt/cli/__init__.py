"""The ``accelrt`` command."""

from accelrt.cli.app import app, main

__all__ = ["app", "main"]
