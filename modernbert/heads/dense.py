"""One layer of a head."""

from __future__ import annotations

from torch import Tensor, nn

from ..encoder import Linear


class Dense(nn.Module):
    """One layer of the head: `activation(W x + b)`, plus `x` or `R x` if residual."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation: str = "Identity",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.use_residual = residual
        self.linear = Linear(in_features, out_features, bias=bias)
        self.residual = (
            Linear(in_features, out_features, bias=False) if residual and in_features != out_features else None
        )
        self.activation: nn.Module = getattr(nn, activation)()

    @property
    def is_projection(self) -> bool:
        """Whether it is `W x + b` and nothing else, of a matrix that nobody has replaced or wrapped."""
        return type(self.linear) is Linear and type(self.activation) is nn.Identity and not self.use_residual

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TE = self.activation(self.linear(x_TD))
        if self.residual is not None:
            return y_TE + self.residual(x_TD)
        return y_TE + x_TD if self.use_residual else y_TE
