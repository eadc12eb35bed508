"""Sets limits in the snippet's process, which what it starts inherits."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .library import Library


def set_all(limits: dict[str, int], library: Library) -> Callable[[], None]:
    """Set them; returns what lifts them again, as reporting their effect takes memory and files."""
    resource = library.module("resource")
    lifted = []
    for name, value in limits.items():
        kind = getattr(resource, name)
        soft, hard = resource.getrlimit(kind)
        # The soft limit only, or it could not be lifted. For processor time the hard one
        # follows, in case SIGXCPU is ignored.
        ceiling = value + 5 if name == "RLIMIT_CPU" else hard
        if hard != resource.RLIM_INFINITY:
            value, ceiling = min(value, hard), min(ceiling, hard)
        resource.setrlimit(kind, (value, ceiling))
        if name != "RLIMIT_CPU":
            lifted.append((kind, (soft, hard)))

    def lift() -> None:
        for kind, values in lifted:
            resource.setrlimit(kind, values)

    return lift
