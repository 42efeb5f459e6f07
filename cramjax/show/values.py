"""Values that have a view: what a dataclass inherits to print well. It is cheap to import, and views are not."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cramjax.show.tables import Page


class Viewed:
    """A value that prints as its view: the same text everywhere, tables in a notebook, wrapped in a narrow terminal.

    A dataclass that inherits this says `repr=False`, or it would print its fields.
    """

    def __rich__(self) -> "Page":
        """The view: a call into the module that builds it."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.__rich__().text()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.__rich__().html()
