"""Objects that remember how they were made."""

from __future__ import annotations

import inspect
from typing import Any


class Configured:
    """Remembers the arguments it was constructed with, so that a checkpoint can write them down (`mm.hub`)."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__init__ is object.__init__ and (args or kwargs):  # Python lets it pass where only __new__ is defined
            raise TypeError(f"{cls.__name__}() takes no arguments")
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", (args, kwargs))  # an nn.Module can't take attributes before its __init__
        return self

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments by name, defaults too (they may change in a later version). Raises `ValueError`
        where one has no name (`*args`)."""
        args, kwargs = self.__dict__["_arguments"]
        bound = inspect.signature(type(self).__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        out: dict[str, Any] = {}
        for parameter in list(bound.signature.parameters.values())[1:]:
            value = bound.arguments[parameter.name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                if value:
                    raise ValueError(
                        f"{type(self).__name__} got unnamed arguments, which a checkpoint can't hold; name them"
                    )
                continue
            out.update(value if parameter.kind is inspect.Parameter.VAR_KEYWORD else {parameter.name: value})
        return out


class Checked(Configured):
    """Refuses at once, with a `ValueError`, arguments of other types than the constructor's annotations. What is annotated as
    something that no checkpoint could hold is let pass: such an object works, and can't be saved."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from mm.description import check_arguments, plain

        self = super().__new__(cls, *args, **kwargs)
        signature = inspect.signature(cls.__init__)
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:  # the call itself says what is missing or unknown
            return self
        named = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)][1:]
        values = {}
        for name in named:
            if name in given:
                try:
                    values[name] = plain(given[name], name)
                except ValueError:
                    values[name] = given[name]
        check_arguments(cls, values, cls.__name__)
        return self
