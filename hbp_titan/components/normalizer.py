"""Loss normalizers: the weight that each trained token has in the gradient of its optimizer step (paper section 3.3).

Owns the four that the paper compares. The objective of a step is the sum over its trained tokens of weight * loss,
summed over all ranks and iterations, so a normalizer is nothing but these weights. They follow from the plan alone:
no rank asks another. With T tokens trained in the step, T_p of them in a pack (one data-parallel rank of one
iteration), t_i in a sample, P packs and S samples with trained tokens in the step:

    ave_token    1 / T           every token counts the same, however it is packed
    token_mean   1 / (T_p * P)   mean within each rank's pack, then over packs: a token in a sparse pack counts more
    sample_mean  1 / (t_i * S)   mean within each sample, then over samples: a token of a short answer counts more
    sum          1               grows with the step's tokens

Each function takes (plan, iteration, sample ids of one pack, int64 [n]) and returns the weight of each trained token of
each sample, float64 [n]; 0 for a sample that trains nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hbp_titan.data.loader import SampleWeights
from hbp_titan.packing import Plan


def ave_token(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every trained token of the step counts the same."""
    step = int(plan.step_of_iteration[iteration])
    return _where_trained(plan, sample_ids, 1.0 / max(int(plan.step_loss_tokens[step]), 1))


def token_mean(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every pack with trained tokens counts the same."""
    first, last = _iterations_of_step(plan, iteration)
    trained = _trained_by_pack(plan, first, last)
    in_pack = int(plan.loss_tokens[sample_ids].sum())
    return _where_trained(plan, sample_ids, 1.0 / max(in_pack * int((trained > 0).sum()), 1))


def sample_mean(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every sample with trained tokens counts the same."""
    first, last = _iterations_of_step(plan, iteration)
    samples = int((plan.loss_tokens[plan.samples_of(first, last)] > 0).sum())
    trained = plan.loss_tokens[sample_ids]
    return np.where(trained > 0, 1.0 / np.maximum(trained * samples, 1), 0.0)


def loss_sum(plan: Plan, iteration: int, sample_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The plain sum."""
    return _where_trained(plan, sample_ids, 1.0)


NORMALIZERS: dict[str, SampleWeights] = {
    "ave_token": ave_token,
    "token_mean": token_mean,
    "sample_mean": sample_mean,
    "sum": loss_sum,
}


def weight_range(normalizer: SampleWeights, plan: Plan, step: int) -> tuple[float, float]:
    """Smallest and largest weight of any trained token of an optimizer step, as multiples of ave_token's 1 / T.

    (1, 1) says that every token counts the same; (0.2, 9) that some count 45 times as much as others.
    """
    first, last = int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])
    if normalizer is token_mean:
        trained = _trained_by_pack(plan, first, last)
        weights = 1.0 / (trained[trained > 0] * max(int((trained > 0).sum()), 1))
    else:
        # Its pack does not matter to a sample: all of the step at once.
        weights = normalizer(plan, first, plan.samples_of(first, last))
    weights = weights[weights > 0] * int(plan.step_loss_tokens[step])
    return (float(weights.min()), float(weights.max())) if len(weights) else (0.0, 0.0)


def _trained_by_pack(plan: Plan, first: int, last: int) -> NDArray[np.int64]:
    """Trained tokens of each pack of iterations first to last - 1."""
    offsets = plan.packs.offsets[plan.pack_offsets[first] : plan.pack_offsets[last] + 1]
    running = np.concatenate([[0], np.cumsum(plan.loss_tokens[plan.samples_of(first, last)])])
    return np.diff(running[offsets - offsets[0]])


def _iterations_of_step(plan: Plan, iteration: int) -> tuple[int, int]:
    step = int(plan.step_of_iteration[iteration])
    return int(plan.step_offsets[step]), int(plan.step_offsets[step + 1])


def _where_trained(plan: Plan, sample_ids: NDArray[np.int64], weight: float) -> NDArray[np.float64]:
    return np.where(plan.loss_tokens[sample_ids] > 0, weight, 0.0)
