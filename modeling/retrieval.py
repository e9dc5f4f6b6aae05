"""Nearest neighbours by cosine similarity, and how good they are: the metric space that a classifier's features span.

Letters: q queries, n entries of the database, d features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512
"""Queries compared at once: similarities to a database of 50,000 take 100 MB then."""


class RetrievalScores(NamedTuple):
    """Means over the queries whose class has another image in the database."""

    recall_at_1: float
    """Share whose nearest neighbour is of their class: also the accuracy of a nearest-neighbour classifier."""
    recall_at_5: float
    """Share with one of their class among the five nearest."""
    mean_average_precision: float
    """Mean over queries of the mean, over the images of their class, of the precision down to each."""
    n_queries: int
    """How many queries that is."""


@torch.no_grad()
def retrieval_scores(
    query_qd: Tensor, database_nd: Tensor, query_label_q: Tensor, database_label_n: Tensor, *, own_n: bool
) -> RetrievalScores:
    """Search each query's neighbours in the database. Features are of any scale and float dtype; labels int64.

    `own_n`: query i and database entry i are the same image, which does not count as its own neighbour. Entries equally near
    keep the database's order. Raises ValueError where no query has anything to find, or the shapes do not fit.
    """
    if own_n and query_qd.shape[0] != database_nd.shape[0]:
        raise ValueError(f"{query_qd.shape[0]} queries and {database_nd.shape[0]} entries cannot be the same images")
    if query_qd.shape[1] != database_nd.shape[1]:
        raise ValueError(f"queries of {query_qd.shape[1]} features, entries of {database_nd.shape[1]}: must be equal")
    query_qd, database_nd = F.normalize(query_qd.float(), dim=-1), F.normalize(database_nd.float(), dim=-1)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(query_qd), BLOCK):
        similar_qn = query_qd[start : start + BLOCK] @ database_nd.T
        n = similar_qn.shape[1]
        if own_n:
            rows = torch.arange(len(similar_qn), device=similar_qn.device)
            similar_qn[rows, rows + start] = -torch.inf  # last, and cut off below
            n -= 1
        order_qn = similar_qn.argsort(dim=-1, descending=True, stable=True)[:, :n]
        hit_qn = database_label_n[order_qn] == query_label_q[start : start + BLOCK, None]
        hit_qn = hit_qn[hit_qn.any(-1)]
        rank_n = torch.arange(1, n + 1, device=hit_qn.device)
        precision_qn = hit_qn.cumsum(-1) / rank_n
        average_q = (precision_qn * hit_qn).sum(-1) / hit_qn.sum(-1)
        found = (hit_qn[:, :1].any(-1).sum(), hit_qn[:, :5].any(-1).sum(), average_q.double().sum())
        sums += torch.tensor([*map(float, found), len(hit_qn)], dtype=torch.float64)
    if sums[3] == 0:
        raise ValueError("no query has another image of its class in the database: use more images")
    at_1, at_5, precision = (sums[:3] / sums[3]).tolist()
    return RetrievalScores(at_1, at_5, precision, n_queries=int(sums[3]))
