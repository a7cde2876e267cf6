"""Linear layers, which without gradients are faster on a CPU than torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Above so many rows a product is not bound by reading the weight. Measured with 2 threads of an AMD EPYC, 113 MB of
# float32 weights: 1 row 6.4 ms against torch's 11.9, 4 rows 10.5 against 26.9, 16 rows 21.3 against 33.1, 32 rows 33
# against 40.
FEW_ROWS = 32


class Linear(nn.Linear):
    """torch's linear layer, with other products for float32 on a CPU where no gradients are wanted.

    A few rows are multiplied in blocks of the weight, one a thread. Such a product has to read the weight once and does
    little else. The library below torch gives it one thread's worth of bandwidth or lays the weight out anew first; as
    a batch of products, weight times column, it does neither.

    Many rows are, where ``few_shapes`` is set, multiplied by oneDNN, where torch would take MKL or another BLAS.
    Measured with 2 threads of an AMD EPYC, in GFLOP/s: 4,096 x 256 x 256 187 against 138, 4,096 x 256 x 1,024 208
    against 159, 512 x 256 x 7,254 185 against 102; held to AVX2 157 against 152, 161 against 153, 182 against 112. A
    row's result is the same to the last bit whatever the number of rows, from two on.
    """

    # oneDNN makes code for each number of rows and keeps that of the last thousand: hundreds of megabytes, where the
    # number is another each time. So it is for callers who see to it that there are few, and not for training: a
    # reversible layer's forward pass has no gradients, and its backward pass, which takes away what was added, has.
    few_shapes = False

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        if x.device.type == "cpu" and not torch.is_grad_enabled() and self._is_plain(x):
            rows = x.numel() // self.in_features
            if rows > FEW_ROWS:
                if self.few_shapes and _HAS_ONEDNN and x.dtype == torch.float32:
                    return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            elif rows and (blocks := self._blocks()):
                return self._few_rows(x, rows, blocks)
        return super().forward(x)

    def _is_plain(self, x: Tensor) -> bool:
        # Half precision has kernels of its own, and under autocast each block would be cast anew.
        # A sharded or a quantised weight is no plain parameter.
        exact = self.weight.dtype in (torch.float32, torch.float64) and x.dtype == self.weight.dtype
        plain = type(self.weight) is nn.Parameter and self.weight.is_contiguous()
        return exact and plain and not torch.is_autocast_enabled("cpu")

    def _blocks(self) -> int:
        """A block for each thread, where the rows of the weight come out even; 0 if they do not."""
        threads = torch.get_num_threads()
        return threads if self.out_features % threads == 0 else 0

    def _few_rows(self, x: Tensor, rows: int, blocks: int) -> Tensor:
        weight = self.weight.view(blocks, -1, self.in_features)
        columns = x.reshape(rows, -1).t().expand(blocks, -1, -1)
        # torch declares it as a tensor, but it may be None.
        bias: Tensor | None = self.bias
        out = torch.bmm(weight, columns) if bias is None else torch.baddbmm(bias.view(blocks, -1, 1), weight, columns)
        if rows > 1:
            out = out.view(self.out_features, rows).t().contiguous()
        return out.view(*x.shape[:-1], self.out_features)


class ResidualLinear(Linear):
    """A linear layer whose output is added to a residual stream; it starts smaller, the deeper the model."""


def _has_onednn() -> bool:
    """Whether this build of torch has the product that its own compiler uses; it is no public name."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_HAS_ONEDNN = _has_onednn()
