"""The error classes. Every message says what was wrong with which value, and what to do instead."""


class InvrefError(Exception):
    """Base class of every error that invref raises on purpose."""


class FormulaError(InvrefError, ValueError):
    """A formula that cannot be understood or cannot be used."""


class RangeError(InvrefError, ValueError):
    """A value outside the range on which the asked quantity exists."""


class InputError(InvrefError, TypeError):
    """A tensor whose type the layers do not take."""


class ProofError(InvrefError):
    """A bound that could not be proved."""


class TableError(InvrefError):
    """A decoder table that is damaged."""


class TwiceError(InvrefError, NotImplementedError):
    """A second derivative, which the decoders do not give."""
