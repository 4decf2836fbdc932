"""The inputs of a model beside the tokens: SequenceInfo, and the KVCache of decoding."""

from dataclasses import dataclass

from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles of rotary positions

NO_DOCUMENT = -1  # the document number of padding


class KVCache:
    """The attention keys and values of one sequence of at most `capacity` tokens, so that decoding reads each token once."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._buffers: dict[str, tuple[Tensor, Tensor, int]] = {}  # keys, values and the number of tokens in them

    def append(self, path: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store those of new tokens, 2 x (1, G, T, K), for the module at `path`; return those of all tokens so far."""
        shape = (*k.shape[:2], self.capacity, k.shape[3])
        keys, values, start = self._buffers.get(path) or (k.new_empty(shape), v.new_empty(shape), 0)
        stop = start + k.shape[2]
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        self._buffers[path] = keys, values, stop
        return keys[:, :, :stop], values[:, :, :stop]


@dataclass(frozen=True)
class SequenceInfo:
    """The facts about a batch of sequences that a model reads beside the tokens."""

    positions: Tensor  # (T,) if they are the same in every sequence, else (B, T)
    dropout_keys: list[int] | None = None  # one key per sequence; None: no dropout
    documents: Tensor | None = None  # (B, T) numbers; attention stays within a document; None: one document per sequence
    loss_weight: float = 0.0  # share of the step's target tokens that lie in this batch; weighs auxiliary losses
    rotation: Rotation | None = None  # filled in by a Transformer that has rotary positions
    cache: KVCache | None = None  # keys and values of the tokens before these; None: these are all tokens
