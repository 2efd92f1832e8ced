"""Tensors on disk of a model that transformers builds: names, shapes, and the experts that are one parameter in memory.

Owns the conversion between parameters and the tensors of an HF folder, by transformers' own conversion mapping: renamed
tensors, and the matrices of experts, which are stored one by one. Experts are read expert by expert, so that a rank
reads its own shard only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from hbp_titan.models.transformers_backend import causal_lm


class DiskLayout:
    """The tensors on disk of one architecture.

    names: for each parameter those of its tensors on disk, for experts [expert 0's parts, expert 1's parts, ...].
    shapes: of each of these tensors. Raises ValueError for parameters that are stored in another way.
    """

    def __init__(self, hf_config: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightRenaming

        self._hf = causal_lm(hf_config, "eager")
        conversions = get_model_conversion_mapping(self._hf, add_legacy=False)
        # As transformers does for a model that it has not loaded.
        self._hf._weight_conversions = [one for one in conversions if not isinstance(one, PrefixChange)] or None
        every = get_model_conversion_mapping(self._hf)
        self._renamings = [one for one in every if isinstance(one, WeightRenaming)]
        self._ignored = [re.compile(pattern) for pattern in self._hf._keys_to_ignore_on_load_unexpected or ()]
        self.names: dict[str, list[str]] = {}
        self.shapes: dict[str, list[int]] = {}
        for fqn, parameter in self._hf.named_parameters():
            parts = {name: list(part.shape) for name, part in self._reverted(fqn, parameter.detach()).items()}
            if len(parts) > 1 or list(parameter.shape) not in parts.values():
                parts = self._experts(fqn, parameter.shape, parts)
            self.names[fqn] = list(parts)
            self.shapes |= parts

    def _reverted(self, fqn: str, tensor: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        if self._hf._weight_conversions is None:
            return {fqn: tensor}
        return dict(revert_weight_conversion(self._hf, {fqn: tensor}))

    def _experts(self, fqn: str, shape: Sequence[int], parts: dict[str, list[int]]) -> dict[str, list[int]]:
        """Return `parts` in the order of experts and of the rows of each."""
        experts, rows = shape[0], len(parts) // max(shape[0], 1)
        # A small tensor of the same form tells which elements each part has: its number, three times.
        numbers = torch.arange(experts * max(rows, 1), device="cpu").view(experts, -1, 1).expand(-1, -1, 3).contiguous()
        found = {name: part.tolist() for name, part in self._reverted(fqn, numbers).items()}
        order = {name: value[0][0] for name, value in found.items() if value == [[value[0][0]] * 3]}
        same = [shape[1] // max(rows, 1), shape[2]]
        if len(order) != experts * rows or any(part != same for part in parts.values()):
            raise ValueError(f"{fqn}: transformers stores it in a way that is not read here")
        return {name: parts[name] for name in sorted(parts, key=order.__getitem__)}

    def read_name(self, name: str) -> str | None:
        """Return the name in `names` of a tensor on disk, which may be an older one; None for what is not read."""
        from transformers.core_model_loading import apply_renamings

        if name in self.shapes:
            return name
        prefix = f"{self._hf.base_model_prefix}."
        for renamed in (apply_renamings(name, self._renamings), apply_renamings(prefix + name, self._renamings)):
            if renamed in self.shapes:
                return renamed
            if renamed in self.names:
                return self.names[renamed][0]
        return None if any(pattern.search(name) for pattern in self._ignored) else name

    def part(self, fqn: str, dims: Sequence[slice], read: Callable[[str, Sequence[slice]], Tensor]) -> Tensor:
        """Return the part of a parameter in these slices of its first dims. read: of a tensor on disk by its name."""
        names = self.names[fqn]
        if len(names) == 1:
            return read(names[0], dims)
        shape = self._hf.get_parameter(fqn).shape
        experts, rows, *columns = [*dims, *(slice(None),) * (3 - len(dims))]
        per_expert = len(names) // shape[0]
        height = shape[1] // per_expert
        first, end, _ = rows.indices(shape[1])
        matrices = []
        for expert in range(*experts.indices(shape[0])):
            parts = []
            for number in range(first // height, -(-end // height)):
                inside = slice(max(first - number * height, 0), min(end - number * height, height))
                parts.append(read(names[expert * per_expert + number], (inside, *columns)))
            matrices.append(torch.cat(parts) if parts else torch.empty(0, shape[2]))
        return torch.stack(matrices) if matrices else torch.empty(0)

    def split(self, fqn: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors on disk of a whole parameter, which share no memory."""
        parts = self._reverted(fqn, tensor)
        for name, part in parts.items():
            yield name, part.clone() if len(parts) > 1 else part.contiguous()


@lru_cache(maxsize=4)
def disk_layout(hf_config: str) -> DiskLayout:
    """Return the layout of the text of a config.json."""
    return DiskLayout(hf_config)
