"""accelrt makes diffusers pipelines need a fraction of their memory and time, exactly.

    import accelrt
    from diffusers import AnimateDiffPipeline

    pipe = AnimateDiffPipeline.from_pretrained(...)
    accelrt.wrap(pipe)                       # the same pipeline, accelerated
    frames = pipe("a digit bouncing").frames
    print(accelrt.summary(pipe))             # what is fused, what is sliced, what is not
    accelrt.unwrap(pipe)                     # exactly as it was

    with accelrt.profile(pipe) as prof:      # what ran, by name
        pipe("a digit bouncing")
    prof.save("trace.json")

Settings go through :class:`Config` or as keywords: ``accelrt.wrap(pipe, frames_per_slice=2)``.
The fused operators are in :mod:`accelrt.ops`, their pure-torch truth in
:mod:`accelrt.reference`, memory measurement in :mod:`accelrt.memory`.
"""

from typing import TYPE_CHECKING

from accelrt import lazy
from accelrt.config import Config
from accelrt.errors import BudgetError, UnsupportedModelError

# Not at its first use: `accelrt.wrap` is this function, and would be the module of the same name
# where that came later. What it imports for itself is light.
from accelrt.wrap import is_wrapped, plan, reset, summary, unwrap, wrap

if TYPE_CHECKING:
    from accelrt.profiling import Profile, profile
    from accelrt.quality.calibrate import calibrate
    from accelrt.steps import Rehash
else:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "Profile": "accelrt.profiling",
            "Rehash": "accelrt.steps",
            "_C": "accelrt.extension",
            "calibrate": "accelrt.quality.calibrate",
            "profile": "accelrt.profiling",
        },
    )

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Config",
    "Profile",
    "Rehash",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "is_wrapped",
    "plan",
    "profile",
    "reset",
    "summary",
    "unwrap",
    "wrap",
]
