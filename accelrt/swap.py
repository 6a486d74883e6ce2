"""Places a forward on a module instance, beneath hooks of other libraries, and removes it.

Three libraries replace ``module.forward`` by a function of their own and keep the
one that they found: accelerate in ``_old_forward``, diffusers in the function
references of its hook registry. A swapped forward goes where they keep the original,
so that their hooks go on running around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from accelrt.models.forward import Forward

Slot = tuple[Callable[[], Any], Callable[[Any], None], Callable[[], None]]


def _attribute(module: nn.Module, name: str) -> Slot:
    def put(value: Any) -> None:
        module.__dict__[name] = value

    return lambda: module.__dict__.get(name), put, lambda: module.__dict__.pop(name)


def _reference(reference: Any, name: str) -> Slot:
    return (
        lambda: getattr(reference, name),
        lambda value: setattr(reference, name, value),
        lambda: None,
    )


def _slots(module: nn.Module) -> Iterator[Slot]:
    """Everywhere that the innermost forward of ``module`` may be, innermost first."""
    yield _attribute(module, "_old_forward")
    registry = module.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        for name in ("original_forward", "forward"):
            yield _reference(reference, name)
    yield _attribute(module, "forward")


def find(module: nn.Module) -> Forward | None:
    """The forward of ours that ``module`` has, or ``None``."""
    from accelrt.models.forward import Forward

    for get, _, _ in _slots(module):
        value = get()
        if isinstance(value, Forward):
            return value
    return None


def _is_stock(module: nn.Module, value: Any) -> bool:
    """``value`` is the forward of the module's class, bound to it."""
    return (
        getattr(value, "__func__", None) is type(module).forward
        and getattr(value, "__self__", None) is module
    )


def swap(module: nn.Module, forward: Forward) -> None:
    """Make ``forward`` what ``module`` runs, beneath hooks that are attached.

    Raises:
        ValueError: if something unknown has replaced the module's forward.
    """
    for get, put, _ in _slots(module):
        if _is_stock(module, get()):
            forward.replaced = get()
            put(forward)
            return
    if "forward" in module.__dict__:
        raise ValueError(
            f"{type(module).__name__} has a forward that is not its own "
            f"({module.__dict__['forward']!r}); remove what replaced it, then wrap"
        )
    module.__dict__["forward"] = forward


def restore(module: nn.Module) -> None:
    """Put back what :func:`swap` replaced, wherever it is now."""
    from accelrt.models.forward import Forward

    for get, put, remove in _slots(module):
        value = get()
        if not isinstance(value, Forward):
            continue
        if value.replaced is not None:
            put(value.replaced)
        elif module.__dict__.get("forward") is value:
            remove()
        else:
            # A hook came after the wrap: it keeps the stock forward now.
            put(type(module).forward.__get__(module))
