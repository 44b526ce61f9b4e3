"""Low-rank linear layers and the model class of an export.

This file needs torch and transformers only: it serves rankfront itself and travels inside every
exported folder, where `trust_remote_code=True` loads it without rankfront.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel


class FactoredLinear(nn.Module):
    """y = left (right x) + bias: left (m, r), right (r, n). Stores r(m + n) parameters and its bias."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.left = nn.Parameter(torch.empty(out_features, rank))
        self.right = nn.Parameter(torch.empty(rank, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.right), self.left, self.bias)


class PivotedLinear(nn.Module):
    """A rank-r matrix kept as r of its own rows and the coefficients of the others.

    W_r = P [I; C] R with R (r, n) the pivot rows and C (m - r, r): r(m + n - r) parameters, lossless
    (PIFA, arXiv 2501.19090). `order` (m,) puts [p; C p + d], p = R x + c, back into the order of W's rows;
    `bias` is [c; d] with c the pivot rows' own and d that of the others less C c, so that both products take
    theirs along.
    """

    order: torch.Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivots = nn.Parameter(torch.empty(rank, in_features))
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.register_buffer("order", torch.zeros(out_features, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        followed = (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
        )
        if x.is_cpu and x.numel() == self.in_features and not followed:
            return self._of_one_row(x)
        own, others = (None, None) if self.bias is None else self.bias.tensor_split((self.rank,))
        if followed:
            pivot = nn.functional.linear(x, self.pivots, own)
            rest = nn.functional.linear(pivot, self.coefficients, others)
            return torch.cat((pivot, rest), dim=-1).index_select(-1, self.order)
        # Both products straight into one buffer: `cat` would be one more pass over it. Autograd has no `out`.
        rows = x.reshape(-1, self.in_features)
        if x.is_cpu and self.out_features > self.in_features:
            return self._by_features(rows, own, others).view(*x.shape[:-1], self.out_features)
        both = x.new_empty(len(rows), self.out_features)
        pivot, rest = both.tensor_split((self.rank,), dim=1)
        _product(rows, self.pivots.T, own, pivot)
        _product(pivot, self.coefficients.T, others, rest)
        return both.index_select(1, self.order).view(*x.shape[:-1], self.out_features)

    def _of_one_row(self, x: torch.Tensor) -> torch.Tensor:
        """The same (..., m) for the one row of x (..., n), as decoding asks.

        A CPU multiplies a vector faster as a vector. Each layer takes some 100 us, of which a module's
        attributes would be three: they are read where it keeps them.
        """
        weights: Mapping[str, Any] = self._parameters
        pivots, coefficients, bias = weights["pivots"], weights["coefficients"], weights["bias"]
        row = x.reshape(-1)
        if bias is None:
            pivot = torch.mv(pivots, row)
            rest = torch.mv(coefficients, pivot)
        else:
            own, others = bias.tensor_split((self.rank,))
            pivot = torch.addmv(own, pivots, row)
            rest = torch.addmv(others, coefficients, pivot)
        y = torch.cat((pivot, rest)).index_select(0, self.order)
        return y.view(*x.shape[:-1], self.out_features)

    def _by_features(
        self, rows: torch.Tensor, own: torch.Tensor | None, others: torch.Tensor | None
    ) -> torch.Tensor:
        """The same (t, m) for rows (t, n), laid out feature by feature: whole rows are put in order.

        On a CPU that pays on an MLP's wide side: its elementwise work keeps the layout and its next product
        takes it as it is. Elsewhere attention and residual sums lose more by the layout than the order gains.
        """
        both = rows.new_empty(self.out_features, len(rows))
        pivot, rest = both.tensor_split((self.rank,))
        _product(self.pivots, rows.T, None if own is None else own[:, None], pivot)
        _product(self.coefficients, pivot, None if others is None else others[:, None], rest)
        return both.index_select(0, self.order).T


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = a b + bias, where the bias is broadcast; autograd does not see it."""
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def dense_linear(in_features: int, out_features: int, rank: int, bias: bool) -> nn.Linear:
    """A rank-r product kept as one (m, n) weight: near full rank nothing is smaller."""
    return nn.Linear(in_features, out_features, bias)


FORMS: dict[str, Callable[[int, int, int, bool], nn.Module]] = {
    "dense": dense_linear,
    "factored": FactoredLinear,
    "pivoted": PivotedLinear,
}


CODE = "modeling_rankfront.py"
AUTO_MAP = {
    "AutoConfig": "modeling_rankfront.RankfrontConfig",
    "AutoModelForCausalLM": "modeling_rankfront.RankfrontForCausalLM",
}
"""Where transformers finds the classes of a folder: in this file, which every saved folder holds."""


class RankfrontConfig(PretrainedConfig):
    """`base`: the dense model's config; `layers`: {target: {form, rank, bias, in, out}} of replaced layers.

    The model type is its own on purpose: a loader that knows neither rankfront nor this file fails
    instead of opening a half-random base model.
    """

    model_type = "rankfront"

    def __init__(self, base: dict[str, Any] | None = None, layers: dict[str, Any] | None = None, **rest: Any):
        self.base = base or {}
        self.layers = layers or {}
        inherited = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        super().__init__(**{**{key: self.base[key] for key in inherited if key in self.base}, **rest})

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base", {})
        if name not in base:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        # A dict may be a config that the base's nests, which nobody expects as a dict.
        return getattr(self.base_config(), name) if isinstance(base[name], dict) else base[name]

    def base_config(self) -> Any:
        """The dense model's config, made anew: what is written into it is lost."""
        return AutoConfig.for_model(**self.base)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The text's config, as the base finds it; this one, which keeps what is written into it, where the
        base nests none."""
        if not self.base:  # transformers makes one without arguments, for its defaults
            return self
        base = self.base_config()
        text = base.get_text_config(decoder=decoder, encoder=encoder)
        return self if text is base else text


class RankfrontForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose chosen linear layers are kept at low rank."""

    config_class = RankfrontConfig
    base_model_prefix = "base"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RankfrontConfig) -> None:
        super().__init__(config)
        base_config = config.base_config()
        base_config._attn_implementation = config._attn_implementation
        # The precision asked for is the default one while a model is made; the base has a config of its own.
        self.base = AutoModelForCausalLM.from_config(base_config, dtype=torch.get_default_dtype())
        for name, layer in config.layers.items():
            module = FORMS[layer["form"]](layer["in"], layer["out"], layer["rank"], layer["bias"])
            self.base.set_submodule(name, module)
        self.supports_gradient_checkpointing = self.base.supports_gradient_checkpointing
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every weight comes from the file; there is nothing sensible to draw at random."""

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.base.get_input_embeddings()
        return module

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        module: nn.Module = self.base.get_output_embeddings()
        return module

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base's; what is common is named, as `Trainer` reads from here what it may pass on."""
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
        }
        return self.base(**{name: value for name, value in named.items() if value is not None}, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.base.generation_config = self.generation_config
        return self.base.generate(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers does, and this file beside it: what was loaded and saved loads anywhere again."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / CODE)

    @staticmethod
    def with_lora(config: Any) -> Any:
        """A peft LoraConfig that may name low-rank targets (`q_proj`): an adapter lies over the whole layer.

        It stays beside the layer: low-rank weights have no room to merge it into.
        """
        from peft.tuners import lora

        config._register_custom_module({FactoredLinear: lora.Linear, PivotedLinear: lora.Linear})
        return config


AutoConfig.register("rankfront", RankfrontConfig, exist_ok=True)
AutoModelForCausalLM.register(RankfrontConfig, RankfrontForCausalLM, exist_ok=True)
