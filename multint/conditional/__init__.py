"""Networks conditioned on a context: a stack of integrators, and an existing network's layers made conditional."""

from multint.conditional.network import Conditioned, condition
from multint.conditional.stack import Conditional

__all__ = ["Conditional", "Conditioned", "condition"]
