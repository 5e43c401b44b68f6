"""A linear layer with an adapter, in the place and under the names of the layer it was.

    weight, bias      as they were, frozen
    lora_A.weight     (dim, in)
    lora_B.weight     (out, dim)
    lora_magnitude    (out,), DoRA only

`TritonLinearLoRA` is the same on Triton kernels. How a layer inside a model becomes one of them: `lora_patch`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .lora_autograd import apply_memory_efficient_lora, compute_dtype
from .lora_config import PeftConfig
from .lora_making import attach, describe, init_factors, is_dense, is_distributed, new_adapter, summed, unfit
from .triton_linear import lora_linear, require


class LinearLoRA(nn.Linear):
    """`y = x @ W.T + bias + scale * drop(x @ A.T) @ B.T`, with `scale = alpha / dim`, of which A and B are trained.

    `dropout_position` "pre" drops elements of `x` before A, "post" elements of the product with B. With DoRA,
    `y = x @ W.T + bias + (g - 1) * (x @ W.T) + g * scale * (x @ A.T) @ B.T`, where g is the magnitude over the row
    norms of `W + scale * B @ A`, which count as constants in the gradient.

    `LinearLoRA(linear, ...)` is a new module on the parameters of `linear`: they are frozen and not copied, so "meta"
    is as good a device as another. To adapt a layer inside a model use `patch_linear_module` or
    `apply_lora_to_linear_modules`. The positional arguments are NeMo Automodel's.

    **Raises:** `NotImplementedError` for what is not an `nn.Linear`; `ValueError` or `TypeError` for options out of
    range, a module that has an adapter already, or a quantised base without `lora_dtype`.

    **Source:** Hu et al., arXiv:2106.09685; DoRA: Liu et al., arXiv:2402.09353, equation 5 and section 4.3.
    """

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_magnitude: nn.Parameter | None
    dim: int
    alpha: float
    scale: float
    dropout_p: float
    dropout_position: str
    use_dora: bool
    use_memory_efficient_lora: bool
    layer_name: str | None
    base_is_plain: bool

    def __init__(
        self,
        orig_linear: nn.Linear,
        dim: int = 8,
        alpha: float = 32,
        dropout: float = 0.0,
        dropout_position: str = "post",
        lora_A_init_method: str = "xavier",
        lora_dtype: torch.dtype | str | None = None,
        *,
        use_dora: bool = False,
        use_memory_efficient_lora: bool = True,
    ) -> None:
        config = PeftConfig(
            dim=dim,
            alpha=alpha,
            dropout=dropout,
            dropout_position=dropout_position,  # pyright: ignore[reportArgumentType]
            lora_A_init=lora_A_init_method,
            lora_dtype=lora_dtype,
            use_triton=isinstance(self, TritonLinearLoRA),
            use_dora=use_dora,
            use_memory_efficient_lora=use_memory_efficient_lora,
        )
        reason = unfit(orig_linear, config)
        if reason is not None:
            raise reason
        if type(orig_linear).forward is not nn.Linear.forward:
            raise NotImplementedError(
                f"{type(orig_linear).__name__} has a forward of its own, which a new LinearLoRA would not run: use "
                "patch_linear_module, which keeps it"
            )
        adapter = new_adapter(orig_linear, config)
        super().__init__(1, 1, bias=False, device="meta")  # what every module has; the next lines give it its own
        self.in_features, self.out_features = orig_linear.in_features, orig_linear.out_features
        self.weight, self.bias = orig_linear.weight, orig_linear.bias
        self.train(orig_linear.training)
        attach(self, adapter, config, None)
        self.base_is_plain = True

    def init_lora_weights(self, init_method: str) -> None:
        """A anew ("xavier", "kaiming" or "uniform") and B zero, as after `to_empty` of a meta module."""
        PeftConfig(lora_A_init=init_method)
        init_factors(self.lora_A.weight, self.lora_B.weight, init_method)

    @torch.no_grad()
    def init_dora_magnitude(self) -> None:
        """Sets the magnitude to the row norms of `W + scale * B @ A`: the adapted layer then is the undecomposed one.

        **Raises:** `RuntimeError` without DoRA, or while weights are on the meta device.
        """
        if self.lora_magnitude is None:
            raise RuntimeError(f"{self.where}no magnitude: the module was made with use_dora=False")
        if any(each.is_meta for each in (self.weight, self.lora_A.weight, self.lora_magnitude)):
            raise RuntimeError(f"{self.where}weights are on the meta device: load them before init_dora_magnitude()")
        self.lora_magnitude.copy_(summed(self._weight_norm()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out). The base runs by its own class's forward, so a quantised one does what it did.

        **Raises:** `ValueError` for an `x` of another number of features, `TypeError` for one of another dtype than
        the weight's outside of autocast; both name the layer, if it has a `layer_name`.
        """
        self._check_input(x)
        base = super().forward(x)
        if self.use_dora:
            return self._dora(x, base)
        if not (self.training and self.dropout_p):
            return self._low_rank(x, base)
        if self.dropout_position == "pre":
            return self._low_rank(F.dropout(x, self.dropout_p), base)
        # Of a row-wise split layer each device has a partial sum; the mask is one of the whole.
        return base + F.dropout(summed(self._low_rank(x)), self.dropout_p).to(base.dtype)

    def materialize_effective_weight(self) -> torch.Tensor:
        """The one weight that does what base and adapter do: (out, in) of the base's dtype, rounded once.

        Differentiable with respect to the adapter.

        **Raises:** `NotImplementedError` for a base that is quantised or has a forward of its own; `RuntimeError` in
        training mode with dropout, where no single weight does what the layer does.
        """
        if not is_dense(self):
            raise NotImplementedError(f"{self.where}the base is packed ({describe(self.weight)}): dequantise it first")
        if not self.base_is_plain:
            raise NotImplementedError(f"{self.where}the base has a forward of its own, which no weight alone does")
        if self.training and self.dropout_p:
            raise RuntimeError(f"{self.where}dropout={self.dropout_p} is active: call eval() first")
        weight = self._sum()
        if self.use_dora:
            weight = self._gain()[:, None] * weight
        return weight.to(self.weight.dtype)

    def extra_repr(self) -> str:
        options = f"dim={self.dim}, alpha={self.alpha}"
        if self.dropout_p:
            options += f", dropout={self.dropout_p} ({self.dropout_position})"
        return f"{super().extra_repr()}, {options}" + (", dora" if self.use_dora else "")

    @property
    def where(self) -> str:
        """The layer's name, for the beginning of an error message."""
        return f"{self.layer_name}: " if self.layer_name else ""

    def _check_input(self, x: torch.Tensor) -> None:
        """**Raises** `ValueError` or `TypeError` for an `x` that does not fit a dense weight; others say so."""
        weight = self._parameters.get("weight")  # not `self.weight`, which a parametrisation would compute
        if weight is None or not self.base_is_plain:
            return
        if x.shape[-1:] != weight.shape[1:]:
            raise ValueError(
                f"{self.where}x has shape {tuple(x.shape)}, and the layer takes {weight.shape[1]} features: the last "
                "dimension has to be that"
            )
        if x.dtype != weight.dtype and not _autocasts(x):
            raise TypeError(
                f"{self.where}x is {x.dtype} and the weight {weight.dtype}: cast one of them, or run under autocast"
            )

    def _low_rank(self, x: torch.Tensor, res: torch.Tensor | None = None) -> torch.Tensor:
        """`res + scale * (x @ A.T) @ B.T`."""
        a, b = self.lora_A.weight, self.lora_B.weight
        # Placements are DTensor's business, and hooks of the children may be what distributes their inputs.
        spread = is_distributed(x) or is_distributed(a)
        if self.use_memory_efficient_lora and not spread:
            return apply_memory_efficient_lora(x, a, b, self.scale, res=res)
        if a.dtype == b.dtype == x.dtype or compute_dtype(x) != x.dtype:
            # Scaled between the two, while the result may still be a partial sum over devices.
            low = self.lora_B(self.lora_A(x) * self.scale)
        else:
            low = F.linear(F.linear(x, a.to(x.dtype)) * self.scale, b.to(x.dtype))
        return low if res is None else res + low.to(res.dtype)

    def _dora(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        drops = self.dropout_p if self.training else 0.0
        if drops and self.dropout_position == "pre":
            x = F.dropout(x, drops)
            plain = F.linear(x, self.weight)
        else:
            plain = base if self.bias is None else base - self.bias.to(base.dtype)
        low = self._low_rank(x)
        if drops and self.dropout_position == "post":
            low = F.dropout(summed(low), drops)
        gain = self._gain()
        return base + (gain - 1).to(base.dtype) * plain + gain.to(base.dtype) * low.to(base.dtype)

    def _gain(self) -> torch.Tensor:
        """Magnitude over norm, (out,), at least float32. A row of norm 0 has a finite one: its products are 0."""
        assert self.lora_magnitude is not None
        norm = self._weight_norm()
        return self.lora_magnitude.to(norm.dtype) / norm.masked_fill(norm == 0, 1)

    @torch.no_grad()
    def _weight_norm(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self._sum(), dim=1)

    def _sum(self) -> torch.Tensor:
        """`W + scale * B @ A`, at least float32."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.to(wide) + self.scale * (self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide))


def _autocasts(x: torch.Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_trained(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the base waits for gradients, which the functions of a whole layer do not compute."""
    if not weight.requires_grad and (bias is None or not bias.requires_grad):
        return False
    # No leaf is a view of FSDP's, which asks for gradients if any part of its flat parameter does.
    waiting = [each for each in (weight, bias) if each is not None and each.requires_grad and each.is_leaf]
    return bool(waiting) and torch.is_grad_enabled()


class TritonLinearLoRA(LinearLoRA):
    """`LinearLoRA` on the kernels of `lora_jax/kernels/triton_*`, forward and backward, with no dropout mask stored.

    On Hopper a dense base is multiplied in the same kernel as the adapter's tail, and for ranks up to 16 and many
    tokens `x @ A` too (`triton_product`); elsewhere by torch, on top of the adapter's part. Other thin products are
    torch's where nothing is dropped (`triton_linear`). Behind a base with a forward of its own, and with DoRA, the
    kernels compute the low-rank branch. float32, float16 and bfloat16, one dtype for `x` and the base; factors of
    another dtype are cast. With `use_memory_efficient_lora=False` `x @ A` (dim numbers a token) is kept for the
    backward pass, which saves it one pass over `x`.

    **Raises:** when called, `RuntimeError` without a CUDA GPU (unless `TRITON_INTERPRET=1` is set before the first
    import of triton), `TypeError` for other dtypes, `NotImplementedError` for a DTensor or a base that is not frozen.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias, a = self.weight, self.bias, self.lora_A.weight
        self._check_input(x)
        require(self, x, weight, a)
        if self.use_dora or not self.base_is_plain:
            return super().forward(x)
        if is_trained(weight, bias):
            raise NotImplementedError(
                f"{self.where}weight or bias are to be trained, and the Triton layer has no gradient for them: freeze "
                "both with requires_grad_(False), or write use_triton=False"
            )
        return lora_linear(
            x,
            weight,
            bias,
            a,
            self.lora_B.weight,
            self.scale,
            self.dropout_p if self.training else 0.0,
            post=self.dropout_position == "post",
            keep=not self.use_memory_efficient_lora,
        )

    def _low_rank(self, x: torch.Tensor, res: torch.Tensor | None = None) -> torch.Tensor:
        return apply_memory_efficient_lora(x, self.lora_A.weight, self.lora_B.weight, self.scale, True, res)
