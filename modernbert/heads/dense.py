"""One layer of a head."""

from __future__ import annotations

from torch import Tensor, nn

from ..modules import Linear, is_plain


class Dense(nn.Module):
    """`[T, in_features]` to `[T, out_features]`: `activation(W x + b)`, plus `x` or `R x` with `residual`.

    Args:
        activation: name of a class in `torch.nn` without parameters.
        residual: add the input, projected by a matrix R where the two widths differ.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        activation: str = "Identity",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.linear = Linear(in_features, out_features, bias=bias)
        self.activation: nn.Module = getattr(nn, activation)()
        self.residual: nn.Module | None = None
        if residual:
            same = in_features == out_features
            self.residual = nn.Identity() if same else Linear(in_features, out_features, bias=False)

    @property
    def is_projection(self) -> bool:
        """Whether a call computes only `W x + b`: nothing has been replaced or wrapped, or has a hook."""
        plain = is_plain(self, Dense) and is_plain(self.linear, Linear) and is_plain(self.activation, nn.Identity)
        return plain and self.residual is None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TE = self.activation(self.linear(x_TD))
        return y_TE if self.residual is None else y_TE + self.residual(x_TD)
