"""The encoder of a transformer, pre-norm (Xiong et al., 2020), shared by the models that are made of it.

Query, key and value are layers of their own, so that tensor parallelism splits each by heads; a layer that packs the
three would hand some ranks queries alone.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

TENSOR = {
    "blocks.*.attention.query": "column",
    "blocks.*.attention.key": "column",
    "blocks.*.attention.value": "column",
    "blocks.*.attention.out": "row",
    "blocks.*.mlp.up": "column",
    "blocks.*.mlp.down": "row",
}
"""How the layers of a model's ``blocks`` are split over ranks: two sums of activations per block and direction."""

TOKENS = {
    "embed": "deal",
    "blocks.*.attention_norm": "each",
    "blocks.*.attention": "gather",
    "blocks.*.attention.mix": "dot_product",
    "blocks.*.mlp_norm": "each",
    "blocks.*.mlp": "gather",
    "head": "join",
}
"""Where the tokens of a model of ``embed``, ``blocks`` and ``head`` may be shared out over ranks."""


class DotProduct(nn.Module):
    """Scaled dot-product attention of queries, keys and values [n, heads, tokens, width of a head]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class Attention(nn.Module):
    """Multi-head self-attention over [n, tokens, width], float32 or what autocast makes of it."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} heads")
        self.heads = heads
        self._head_width = width // heads
        self.mix = DotProduct(dropout)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (self._by_heads(layer(tokens)) for layer in (self.query, self.key, self.value))
        attended: Tensor = self.out(self.mix(query, key, value).transpose(1, 2).flatten(2))
        return attended

    def _by_heads(self, values: Tensor) -> Tensor:
        """[n, heads of this rank, tokens, width of a head]"""
        return values.view(*values.shape[:2], -1, self._head_width).transpose(1, 2)


class MLP(nn.Module):
    """Two layers with GELU between them, each token by itself."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        mixed: Tensor = self.down(self.dropout(F.gelu(self.up(tokens))))
        return mixed


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self.attention(self.attention_norm(tokens)))
        mixed: Tensor = tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))
        return mixed


def encoder(depth: int, width: int, heads: int, hidden: int, dropout: float = 0.0) -> nn.ModuleList:
    """``depth`` blocks."""
    return nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(depth))
