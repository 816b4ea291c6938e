"""Loss expressions on the command line."""

from segloss.losses import LOSSES, Loss
from segloss.losses import parse_loss as parse

from .errors import UserError

__all__ = ["LOSSES", "parse_loss"]


def parse_loss(expression: str) -> Loss:
    """`segloss.parse_loss`, whose complaint is the user's."""
    try:
        return parse(expression)
    except ValueError as error:
        raise UserError(str(error)) from None
