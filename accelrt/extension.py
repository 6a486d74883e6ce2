"""The compiled extension, or how to come by it."""

import torch  # noqa: F401 - brings the libraries that the extension needs

try:
    import accelrt._C as _C
except ImportError as error:
    raise ImportError(
        "accelrt's compiled extension is missing or does not load "
        f"({error}). Build it with `pip install .` in the source folder; "
        "`accelrt doctor` then says what was built."
    ) from error

__all__ = ["_C"]
