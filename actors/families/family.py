"""What a family of models declares: where its decoder blocks are and which layers in them are targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from actors.linears import is_linear
from actors.types import RankfrontError

# Llama's block, which most families since have taken over.
GATED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Family:
    """Models laid out alike: `blocks` is the path of the decoder blocks, `modules` the targets of each.

    `model_types` are the values of `config.model_type` it is for; a module in `optional` may be missing
    from a block. `note` is what the user should know about the choice of targets, None where nothing.
    `bias_switches` are settings of the config that give targets a bias they lack.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str = "model.layers"
    modules: tuple[str, ...] = GATED
    optional: tuple[str, ...] = ()
    note: str | None = None
    bias_switches: tuple[str, ...] = ()

    def decoder_blocks(self, model: nn.Module) -> nn.ModuleList:
        """The list at `blocks`.

        Raises:
            RankfrontError: `model` has none there.
        """
        try:
            blocks = model.get_submodule(self.blocks)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise RankfrontError(
                f"{type(model).__name__} has no list of decoder blocks at {self.blocks}, where family "
                f"{self.name!r} has it"
            )
        return blocks

    def linears(self, model: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
        """(block, module, linear layer) of every target in the model's order.

        A layer whose weight is under another name of the model as well, shared or tied, is none: a low rank
        under one name would leave the dense weight under the other, stored and counted.

        Raises:
            RankfrontError: every declared module that a block lacks, or that is no linear layer.
        """
        holders = _holders(model)
        declared = self._declared(model)
        yield from (each for each in declared if holders[id(each[2].weight)] == 1)

    def shared(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the declared layers that stay dense because their weight has other names as well."""
        holders = _holders(model)
        declared = self._declared(model)
        return tuple(
            f"{self.blocks}.{index}.{module}"
            for index, module, layer in declared
            if holders[id(layer.weight)] > 1
        )

    def _declared(self, model: nn.Module) -> list[tuple[int, str, nn.Module]]:
        """(block, module, linear layer) of all that is declared; raises as `linears` does."""
        found: list[tuple[int, str, nn.Module]] = []
        mistakes: list[str] = []
        for index, block in enumerate(self.decoder_blocks(model)):
            inside = dict(block.named_modules(remove_duplicate=False))
            for module in self.modules:
                where = f"{self.blocks}.{index}.{module}"
                if module not in inside:
                    if module not in self.optional:
                        mistakes.append(f"{where} is missing")
                elif not is_linear(inside[module]):
                    mistakes.append(f"{where} is a {type(inside[module]).__name__}, no linear layer")
            found += [(index, name, layer) for name, layer in inside.items() if name in self.modules]
        if mistakes:
            raise RankfrontError(
                "\n".join(f"family {self.name!r} in {type(model).__name__}: {what}" for what in mistakes)
            )
        return found


def _holders(model: nn.Module) -> Counter[int]:
    """How many modules, by name, hold each parameter, by id."""
    modules = model.named_modules(remove_duplicate=False)
    return Counter(id(held) for _, module in modules for held in module.parameters(recurse=False))
