"""How a source's tensors lie on the ranks: what they are here, and what makes them whole.

V classes, N tokens, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from segloss.checks import describe, is_dtensor
from segloss.sharding import (
    Crossing,
    Sharding,
    VocabShard,
    gathered_tokens,
    sharding_of,
    sum_of_gradients,
)


class Layout(ABC):
    """What a source asks of its tensors' places."""

    num_classes: int

    @property
    @abstractmethod
    def sharding(self) -> Sharding:
        """Of the columns; may ask the other ranks, once."""

    @property
    @abstractmethod
    def assumed(self) -> Sharding:
        """`sharding`, without asking."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many ranks share the columns."""

    @property
    @abstractmethod
    def is_plain(self) -> bool:
        """Whether every tensor is what it seems: whole, and of this rank alone."""

    @property
    @abstractmethod
    def tokens_are_shared_out(self) -> bool:
        """Whether hidden is a part of the tokens that the vocabulary's ranks share out."""

    @abstractmethod
    def leading_shape(self, shape: torch.Size) -> torch.Size:
        """The target's shape, for hidden states or logits of `shape`."""

    @abstractmethod
    def hidden(self, x: Tensor) -> Tensor:
        """Hidden states (..., D) of all the target's tokens, whose gradient finds its way back."""

    @abstractmethod
    def columns(self, x: Tensor, sharding: Sharding, dim: int = 0) -> Tensor:
        """What belongs to the columns here, without padding."""

    @abstractmethod
    def replicated(self, x: Tensor) -> Tensor:
        """A tensor that all ranks have."""

    def crossings(self, hidden: Tensor, trained: dict[str, Tensor], tokens: int) -> list[Crossing]:
        """What makes the tensors whole, and brings the gradients of those `trained` back."""
        found = []

        def crossing(phase: str, ranks: str, kind: str, count: int, numbers: int) -> None:
            found.append(Crossing(phase, ranks, kind, count, numbers * hidden.element_size()))

        own = hidden.to_local() if is_dtensor(hidden) else hidden  # type: ignore[attr-defined]
        every = tokens * hidden.shape[-1]
        if self.vocabulary > 1:
            if self.tokens_are_shared_out:
                crossing("forward", "vocabulary", "all-gather", 1, own.numel())
            if "hidden" in trained:
                back = "reduce-scatter" if self.tokens_are_shared_out else "all-reduce"
                crossing("backward", "vocabulary", back, 1, every)
            if "lora_a" in trained:
                crossing("backward", "vocabulary", "all-reduce", 1, trained["lora_a"].numel())
        heads = [tensor.numel() for name, tensor in trained.items() if name != "hidden"]
        if self.sums_heads and heads:
            crossing("backward", "tokens", "all-reduce", len(heads), sum(heads))
        return found

    @property
    def sums_heads(self) -> bool:
        """Whether the head's gradients are summed over the ranks with other tokens."""
        return False

    @abstractmethod
    def token_group(self, group) -> Any:
        """The group of the ranks with other tokens, from the one a loss was given."""

    @abstractmethod
    def like_target(self, name: str, x) -> Any:
        """A tensor that goes with the target, as it is here."""

    @abstractmethod
    def like_logits(self, name: str, x) -> Any:
        """A tensor (..., V) that goes with the logits, as it is here; plain ones may be whole."""

    @property
    def shared_tokens(self) -> Any:
        """What two layouts have in common whose ranks share out the tokens alike, None for none."""
        return None


@dataclass(frozen=True)
class Plain(Layout):
    """Plain tensors: the whole vocabulary, or a slice of it that `vocab` tells of."""

    rows: int  # of the head, or columns of the logits
    device: torch.device
    vocab: VocabShard | None

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.rows if self.vocab is None else self.vocab.num_classes

    @property
    def sharding(self) -> Sharding:
        if self.vocab is None:
            return Sharding.whole(self.rows)
        return self.vocab.sharding(self.rows, self.device)

    @property
    def assumed(self) -> Sharding:
        return Sharding.whole(self.rows) if self.vocab is None else self.vocab.assumed(self.rows)

    @property
    def vocabulary(self) -> int:
        return 1 if self.vocab is None else self.vocab.size

    @property
    def is_plain(self) -> bool:
        return self.vocab is None

    @property
    def tokens_are_shared_out(self) -> bool:
        return self.vocab is not None and self.vocab.sequence_dim is not None

    def leading_shape(self, shape: torch.Size) -> torch.Size:
        sizes = list(shape[:-1])
        if self.vocab is not None and self.vocab.sequence_dim is not None:
            sizes[self.vocab.sequence_dim % len(shape)] *= self.vocab.size
        return torch.Size(sizes)

    def hidden(self, x: Tensor) -> Tensor:
        return x if self.vocab is None else gathered_tokens(x, self.vocab)

    def columns(self, x: Tensor, sharding: Sharding, dim: int = 0) -> Tensor:
        return x if x.shape[dim] == sharding.width else x.narrow(dim, 0, sharding.width)

    def replicated(self, x: Tensor) -> Tensor:
        return x if self.vocab is None else sum_of_gradients(x, self.vocab)

    def token_group(self, group) -> Any:
        return group

    def like_target(self, name: str, x) -> Any:
        if is_dtensor(x):
            raise TypeError(
                f"{name} is a DTensor, but the logits are of plain tensors; it takes a plain one: "
                f"{name}.to_local() for this rank's tokens"
            )
        return x

    def like_logits(self, name: str, x) -> Any:
        return self.like_target(name, x)


@dataclass(frozen=True)
class Meshed(Layout):
    """DTensors on one mesh, by their placements."""

    mesh: Any
    num_classes: int
    tokens: tuple  # placements of the tokens: those of hidden, replicated where the vocabulary is
    vocab_dim: int | None  # the mesh dimension that shares the vocabulary
    token_dims: tuple[int, ...]  # those that share out the tokens
    gathers: bool  # hidden is cut along the vocabulary's mesh dimension too

    @property
    def sharding(self) -> Sharding:
        if self.vocab_dim is None:
            return Sharding.whole(self.num_classes)
        size, rank = self.mesh.size(self.vocab_dim), self.mesh.get_local_rank(self.vocab_dim)
        spans = [chunk_of(self.num_classes, size, each) for each in range(size)]
        return sharding_of(self.num_classes, spans, rank, self.mesh.get_group(self.vocab_dim))

    @property
    def assumed(self) -> Sharding:
        return self.sharding

    @property
    def vocabulary(self) -> int:
        return 1 if self.vocab_dim is None else self.mesh.size(self.vocab_dim)

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def tokens_are_shared_out(self) -> bool:
        return self.gathers

    @property
    def sums_heads(self) -> bool:
        return bool(self.token_dims)

    def leading_shape(self, shape: torch.Size) -> torch.Size:
        sizes = list(shape[:-1])
        for dim in self.token_dims:
            at = self.tokens[dim].dim % len(shape)
            size, rank = self.mesh.size(dim), self.mesh.get_local_rank(dim)
            sizes[at] = chunk_of(sizes[at], size, rank)[1]
        return torch.Size(sizes)

    def hidden(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import Partial

        placements: list = list(self.tokens)
        gathered = x.redistribute(placements=placements)  # type: ignore[attr-defined]
        if self.vocab_dim is not None:
            placements[self.vocab_dim] = Partial()
        return gathered.to_local(grad_placements=placements)

    def columns(self, x: Any, sharding: Sharding, dim: int = 0) -> Tensor:
        from torch.distributed.tensor import Partial

        placements = list(x.placements)
        for over in self.token_dims:  # ranks that have other tokens
            if placements[over].is_replicate():
                placements[over] = Partial()
        # as a no-op on the way there it brings the gradient back to x's own placements
        return x.redistribute(placements=x.placements).to_local(grad_placements=placements)

    def replicated(self, x: Tensor) -> Tensor:
        return self.sharding.divided(self.columns(x, self.sharding))

    def token_group(self, group) -> Any:
        if not self.token_dims:
            return group
        ranks = self.token_ranks()
        if group is None:
            if len(self.token_dims) > 1:
                raise ValueError(
                    f"the tokens are sharded over {len(self.token_dims)} dimensions of {self.mesh};"
                    f" give the loss group= the process group of the ranks {ranks}"
                )
            return self.mesh.get_group(self.token_dims[0])
        given = dist.get_process_group_ranks(group)
        if sorted(given) != ranks:
            raise ValueError(
                f"group has the ranks {sorted(given)}, but by their placements the tokens are "
                f"sharded over {ranks}; leave group out, or give it those"
            )
        return group

    def token_ranks(self) -> list[int]:
        own = self.mesh.get_coordinate()
        index = [slice(None) if d in self.token_dims else own[d] for d in range(self.mesh.ndim)]
        return sorted(self.mesh.mesh[tuple(index)].flatten().tolist())

    def like_target(self, name: str, x) -> Any:
        return self.placed(name, x, self.tokens)

    def like_logits(self, name: str, x) -> Any:
        from torch.distributed.tensor import Shard

        placements = list(self.tokens)
        if self.vocab_dim is not None:
            placements[self.vocab_dim] = Shard(x.dim() - 1)
        return self.placed(name, x, placements)

    def placed(self, name: str, x, placements) -> Any:
        if not is_dtensor(x):
            return x
        if x.device_mesh != self.mesh:
            raise ValueError(f"{name} is on {x.device_mesh}, the logits on {self.mesh}")
        return x.redistribute(placements=placements).to_local()

    @property
    def shared_tokens(self) -> Any:
        if not self.token_dims:
            return None
        return self.mesh, tuple((dim, self.tokens[dim]) for dim in self.token_dims)


def chunk_of(size: int, parts: int, index: int) -> tuple[int, int]:
    """(first, length) of a part, as `torch.chunk` and DTensor's Shard cut."""
    each = -(-size // parts)
    first = min(index * each, size)
    return first, min(each, size - first)


WAYS = (
    "under tensor parallelism DTensor.from_local({name}, mesh, [Replicate()]), under FSDP "
    "head_loss(model, loss, target, ...)"
)


def linear_layout(named: list[tuple[str, Tensor]], vocab: VocabShard | None) -> Layout:
    """Of hidden states, a head and what belongs to it."""
    tensors = dict(named)
    hidden, weight = tensors["hidden"], tensors["weight"]
    meshed = [name for name, tensor in named if is_dtensor(tensor)]
    check_vocab(vocab, meshed)
    if not meshed:
        if vocab is not None and vocab.sequence_dim is not None:
            check_sequence_dim(vocab.sequence_dim, hidden)
        return Plain(weight.shape[0] if weight.dim() else 0, hidden.device, vocab)
    for name in tensors:
        if name not in meshed:
            raise TypeError(
                f"{name} is a plain tensor beside a DTensor {meshed[0]}, which does not say "
                f"whether all ranks have the same: {WAYS.format(name=name)}"
            )
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    for name, tensor in named:
        if tensor.device_mesh != mesh:  # type: ignore[attr-defined]
            raise TypeError(
                f"{name} is on {tensor.device_mesh}, weight on {mesh}; "  # type: ignore[attr-defined]
                "they take one mesh"
            )
    vocab_dim, token_dims, tokens = None, [], []
    for dim in range(mesh.ndim):
        of_weight = kind_of("weight", weight, dim, {0: "vocab"})
        leading = dict.fromkeys(range(hidden.dim() - 1), "tokens")
        of_hidden = kind_of("hidden", hidden, dim, leading)
        own = hidden.placements[dim]  # type: ignore[attr-defined]
        if of_weight == "vocab":
            if vocab_dim is not None:
                raise TypeError(
                    f"weight has the placements {placements_of(weight)}; it takes Shard(0) on one "
                    "dimension of the mesh"
                )
            vocab_dim, own = dim, replicate()
        elif of_hidden == "tokens":
            token_dims.append(dim)
        tokens.append(own)
        check_like_weight(tensors, dim)
    gathers = vocab_dim is not None and hidden.placements[vocab_dim].is_shard()  # type: ignore[attr-defined]
    return Meshed(mesh, weight.shape[0], tuple(tokens), vocab_dim, tuple(token_dims), gathers)


def dense_layout(logits: Tensor, vocab: VocabShard | None) -> Layout:
    """Of logits (..., V)."""
    check_vocab(vocab, ["logits"] if is_dtensor(logits) else [])
    if vocab is not None and vocab.sequence_dim is not None:
        raise ValueError(
            f"vocab has sequence_dim={vocab.sequence_dim}, which is of hidden states; logits take "
            "a VocabShard without: every rank of the vocabulary has all tokens"
        )
    if not is_dtensor(logits):
        return Plain(logits.shape[-1], logits.device, vocab)
    mesh, last = logits.device_mesh, logits.dim() - 1  # type: ignore[attr-defined]
    kinds = dict.fromkeys(range(last), "tokens") | {last: "vocab"}
    found = [kind_of("logits", logits, dim, kinds) for dim in range(mesh.ndim)]
    if found.count("vocab") > 1:
        raise TypeError(
            f"logits has the placements {placements_of(logits)}; it takes Shard({last}) on one "
            "dimension of the mesh"
        )
    vocab_dim = found.index("vocab") if "vocab" in found else None
    token_dims = tuple(d for d, kind in enumerate(found) if kind == "tokens")
    own = logits.placements  # type: ignore[attr-defined]
    tokens = tuple(replicate() if d == vocab_dim else own[d] for d in range(mesh.ndim))
    return Meshed(mesh, logits.shape[-1], tokens, vocab_dim, token_dims, False)


def replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def kind_of(name: str, tensor: Any, dim: int, kinds: dict[int, str]) -> str:
    """What a placement on a mesh dimension means: "replicated", or by the tensor's dimension."""
    from torch.distributed.tensor import Shard

    placement = tensor.placements[dim]
    if placement.is_replicate():
        return "replicated"
    if type(placement) is Shard and placement.dim % tensor.dim() in kinds:
        return kinds[placement.dim % tensor.dim()]
    takes = " or ".join(f"Shard({d})" for d in kinds)
    raise TypeError(
        f"{name} has the placements {placements_of(tensor)} on {tensor.device_mesh}; on each "
        f"dimension it takes Replicate() or {takes}: {name}.redistribute(placements=...)"
    )


def check_like_weight(tensors: dict[str, Any], dim: int) -> None:
    """bias and LoRA's B lie as the weight does, A on every rank."""
    of_weight = tensors["weight"].placements[dim]
    for name, tensor in tensors.items():
        if name in ("hidden", "weight"):
            continue
        wanted = replicate() if name == "lora's A" else of_weight
        if tensor.placements[dim] != wanted:
            raise TypeError(
                f"{name} has the placements {placements_of(tensor)}, weight "
                f"{placements_of(tensors['weight'])}; on dimension {dim} of the mesh it takes "
                f"{written(wanted)}"
            )


def check_vocab(vocab: VocabShard | None, meshed: list[str]) -> None:
    if vocab is None:
        return
    if not isinstance(vocab, VocabShard):
        raise TypeError(f"vocab is {describe(vocab)}; it takes a segloss.VocabShard")
    if meshed:
        raise TypeError(
            f"vocab goes with plain tensors, but {meshed[0]} is a DTensor, whose placements say "
            "how it is sharded; leave vocab out"
        )


def check_sequence_dim(dim: int, hidden: Tensor) -> None:
    if not -hidden.dim() <= dim < hidden.dim() - 1 or dim == -1:
        raise ValueError(
            f"vocab's sequence_dim is {dim}; it takes a leading dimension of hidden, which has "
            f"shape {tuple(hidden.shape)}"
        )


def refuse_rows(layout: Layout) -> None:
    if not layout.is_plain:
        raise TypeError(
            "logits of single rows are not put together from several ranks; it takes plain tensors "
            "of all classes"
        )


def placements_of(tensor: Any) -> str:
    return f"({', '.join(map(written, tensor.placements))})"


def written(placement: Any) -> str:
    """A placement as one writes it."""
    from torch.distributed.tensor import Shard

    return f"Shard({placement.dim})" if type(placement) is Shard else repr(placement)
