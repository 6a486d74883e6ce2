"""What `import accelrt` and the help of the commands import, and what is there all the same."""

from __future__ import annotations

import os
import pickle
import pkgutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

import accelrt

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torch._dynamo", "numpy", "diffusers", "transformers", "peft")
SUBMODULES = {item.name for item in pkgutil.iter_modules(accelrt.__path__)}

#: Says which of the libraries are loaded.
LOADED = f"print([name for name in {HEAVY} if name in sys.modules])"
WITHOUT_EXTENSION = "import sys; sys.modules['accelrt._C'] = None"


def run(*lines: str) -> str:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_is_light() -> None:
    """Settings, errors and the names are there before torch is."""
    out = run(
        "import sys, accelrt",
        "accelrt.Config(memory_budget='4GiB').override(frames_per_slice=2)",
        "try: accelrt.Config(memory_budget='4 apples')",
        "except ValueError as error: assert '4 apples' in str(error)",
        "assert {*accelrt.__all__, 'ops', 'steps', 'memory', 'feedback'} <= {*dir(accelrt)}",
        "from accelrt import BudgetError, UnsupportedModelError, is_wrapped, summary, unwrap, wrap",
        LOADED,
    )
    assert out == "[]\n"


def test_help_and_completion_are_light() -> None:
    commands = ("bench", "calibrate", "compare", "demo", "distill", "doctor", "plan", "profile")
    out = run(
        "import sys",
        "from typer.testing import CliRunner",
        "from accelrt.cli import app",
        f"asked = [['--help'], ['--version'], *([name, '--help'] for name in {commands})]",
        "for words in asked:",
        "    result = CliRunner().invoke(app, words)",
        "    assert result.exit_code == 0, result.output",
        "    assert words == ['--version'] or 'Exit codes' in result.output",
        "asked = {'_ACCELRT_COMPLETE': 'complete_bash', 'COMP_WORDS': 'accelrt plan --model an'}",
        "asked['COMP_CWORD'] = '3'",
        "result = CliRunner().invoke(app, [], env=asked, prog_name='accelrt')",
        "assert result.output.split() == ['animatediff'], result.output",
        LOADED,
    )
    assert out == "[]\n"


def test_the_doctor_imports_torch_only() -> None:
    out = run(
        "import sys",
        "from accelrt.cli import app",
        "app(['doctor'], standalone_mode=False)",
        "print()",
        LOADED,
    )
    assert "accelrt is usable here." in out
    loaded = out.splitlines()[-1]
    assert "'torch'" in loaded
    for name in ("torch._dynamo", "diffusers", "transformers", "peft"):
        assert repr(name) not in loaded


def test_every_public_name_is_there() -> None:
    names = dir(accelrt)
    assert {*accelrt.__all__} <= {*names}
    assert names == sorted(set(names))
    assert {name for name in SUBMODULES if not name.startswith("_")} <= {*names}
    for name in accelrt.__all__:
        assert not isinstance(getattr(accelrt, name), ModuleType), name
    scope: dict[str, object] = {}
    exec("from accelrt import *", scope)
    assert {*accelrt.__all__} <= {*scope}
    public = (accelrt.wrap, accelrt.plan, accelrt.profile, accelrt.calibrate, accelrt.Rehash)
    assert pickle.loads(pickle.dumps(public)) == public


def test_an_unknown_name() -> None:
    assert not hasattr(accelrt, "wraps")
    with pytest.raises(AttributeError, match="module 'accelrt' has no attribute 'wraps'"):
        accelrt.wraps  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'wraps'"):
        from accelrt import wraps  # noqa: F401


def test_no_name_is_that_of_a_submodule() -> None:
    """But `wrap`, which the package imports at once."""
    assert {*accelrt.__all__} & SUBMODULES == {"wrap"}


@pytest.mark.parametrize(
    "first",
    [
        "import accelrt.wrap",
        "import accelrt.wrap as module",
        "from accelrt.wrap import forwards",
        "import importlib; importlib.import_module('accelrt.wrap')",
        "import accelrt.swap, accelrt.memory.sizes",
        "import accelrt.quality.search",
    ],
)
def test_wrap_is_the_function(first: str) -> None:
    """Whoever has imported the module of that name, and whatever came first."""
    run(
        first,
        "import sys, types, accelrt",
        "from accelrt import wrap",
        "assert isinstance(wrap, types.FunctionType), wrap",
        "assert accelrt.wrap is wrap is sys.modules['accelrt.wrap'].wrap",
        "import accelrt.wrap",
        "from accelrt.wrap import forwards, wrap as again",
        "assert accelrt.wrap is wrap is again",
    )


#: Loads the libraries once; every line of code runs in a child that has not imported accelrt.
FORKS = """
import os, sys, traceback
import torch, diffusers.models.unets.unet_motion_model, diffusers.pipelines.pipeline_utils
import typer, rich.console
assert "accelrt" not in sys.modules
for code in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(code)
print("all")
"""


def forked(codes: Sequence[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, *codes],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["all"], done.stderr[-3000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_any_import_and_any_attribute_may_come_first() -> None:
    """The submodules, whose imports go in circles in places, and the names of the package."""
    names = sorted({name for name in SUBMODULES if not name.startswith("__")} - {"wrap"})
    nested = ("groups.attention", "memory.arena", "memory.track_peak", "steps.session")
    lazily = ("Profile", "Rehash", "calibrate", "profile")
    same = "import sys, accelrt; assert accelrt.{0} is sys.modules['accelrt.{0}']"
    assert {"_C", "feedback", "ops", "quality", "reference"} <= {*names}
    forked(
        [
            *(same.format(name) for name in names),
            *(f"import accelrt; accelrt.{name}" for name in nested),
            *(f"from accelrt import {name}; import accelrt" for name in lazily),
            "import accelrt; accelrt.profiling; assert callable(accelrt.profile)",
            "import accelrt; accelrt.profile; assert accelrt.profiling.profile is accelrt.profile",
            "import accelrt.planning; assert callable(accelrt.plan)",
        ]
    )


def test_without_the_extension() -> None:
    """Its first use says what to do, whichever module comes to it; the doctor says so too."""
    out = run(
        WITHOUT_EXTENSION,
        "import accelrt",
        "for use in ('accelrt.memory.arena', 'accelrt.ops', 'accelrt._C'):",
        "    try: eval(use)",
        "    except ImportError as error: assert 'Build it with `pip install .`' in str(error)",
        "    else: raise AssertionError(use)",
        "from accelrt.cli import app",
        "app(['doctor'], standalone_mode=False)",
    )
    assert "The extension does not load" in out
    assert "accelrt is not usable here." in out


def test_lazy_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported once, at their first use, and listed before."""
    package = tmp_path / "lazy_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from accelrt import lazy\n"
        "__getattr__, __dir__ = lazy.attributes(__name__, {'answer': 'lazy_package.inner'})\n"
    )
    (package / "inner.py").write_text("answer = object()\n")
    (package / "other.py").write_text("")
    (package / "_private.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import lazy_package  # type: ignore[import-not-found]

    try:
        assert {"answer", "inner", "other"} <= {*dir(lazy_package)}
        assert "lazy_package.inner" not in sys.modules
        answer = lazy_package.answer
        assert answer is sys.modules["lazy_package.inner"].answer
        assert vars(lazy_package)["answer"] is answer
        assert lazy_package.other is sys.modules["lazy_package.other"]
        for name in ("_private", "nothing"):
            with pytest.raises(AttributeError, match=f"'lazy_package' has no attribute '{name}'"):
                getattr(lazy_package, name)
    finally:
        for name in [name for name in sys.modules if name.startswith("lazy_package")]:
            del sys.modules[name]
