"""``python -m accelrt``: the same as the ``accelrt`` command."""

from accelrt.cli import main

if __name__ == "__main__":
    main()
