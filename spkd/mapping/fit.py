"""`spkd map`: train a map from the embeddings of one cache to those of another, over the views that both have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from spkd.cache import Cache
from spkd.errors import SpkdError, UsageError
from spkd.files.atomic import check_holds_no_other, check_replaces_none, check_writable, writable_folder
from spkd.files.text import counted
from spkd.mapping.embedding_map import (
    DESCRIPTION,
    FORMAT,
    WEIGHTS,
    EmbeddingMap,
    MapNetwork,
    Model,
    TrainedOn,
    load_map,
)
from spkd.mapping.pairs import Pairs, read_pairs
from spkd.mapping.settings import MapConfig
from spkd.outputs.target import EMBEDDING
from spkd.progress import track
from spkd.seeding import Purpose, random_state, seed_of

RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0)  # tried for the linear part that training begins with
BATCH, RATE = 256, 1e-3
MOST_SPREAD = 3.0  # greatest factor of the spread: what predicts nothing is not blown up
CHECK = 50  # steps between two looks at the speakers kept aside
LEAST_GAIN = 0.05  # of the cosine with the right embedding over that with other speakers', below which a warning is due
PATIENCE = 6  # looks without a gain that end the training
Both = tuple[torch.Tensor, torch.Tensor]  # (N, D_old) and (N, D_new): embeddings of the same views by both models


def train_map(old: str, new: str, config: MapConfig) -> Iterator[str]:
    """Train a map and write it into `config.out`. Lines that say what it was trained on and how well it does.

    Args:
        old: folder of the cache with the old model's embeddings.
        new: folder of the cache with those of the new model.
    Raises:
        UsageError: caches of one model, without embeddings, without a view in common or with too few speakers; or
            `out` holds something else, or a map between other models.
        SpkdError: a damaged cache, or `out` cannot be written.
    """
    out = Path(config.out)
    check_writable(out / DESCRIPTION)
    check_holds_no_other(out, "a map")
    check_replaces_none(out, (WEIGHTS, DESCRIPTION), {DESCRIPTION: FORMAT.key})
    caches = Cache.open(old), Cache.open(new)
    models = [_model(cache) for cache in caches]
    if models[0].digest == models[1].digest:
        raise UsageError(f"{old} and {new}: both of {models[0].name}; a map is between the spaces of two models")
    _check_replaced(out, *models)
    pairs = read_pairs(*caches, config.views, config.seed)
    of_old, of_new, in_both = pairs.counts
    drawn = "" if len(pairs) == in_both else f", {len(pairs):,} of them drawn (views={config.views})"
    left_out = f"{of_old - in_both:,} of {old} and {of_new - in_both:,} of {new}"
    yield f"{counted(in_both, 'view')} in both caches{drawn}"
    yield f"left out, as they are not in both or the same as another view: {left_out}"
    if [part.manifest for part in caches[0].card.parts] != [part.manifest for part in caches[1].card.parts]:
        yield (
            f"note: {old} and {new} were extracted from manifests that differ; views are paired by the names of "
            "utterances, so let equal names be the same recordings"
        )
    aside = speakers_aside(pairs, config.held_out, config.seed)
    made = fit(models[0], models[1], pairs, aside, config, [cache.fingerprint for cache in caches])
    made.save(writable_folder(out))
    trained = made.trained_on
    alone = "" if pairs.labelled else " (an utterance without a label counts as one)"
    before = f"{made.old.width} and {made.new.width} numbers" if trained.before is None else f"{trained.before:.3f}"
    yield (
        f"cosine of the old with the new embedding of a view, {counted(trained.kept_aside, 'speaker')} kept aside of "
        f"{trained.speakers:,}{alone}: {before} before, {trained.after:.3f} mapped (step {trained.steps:,})"
    )
    if trained.after < trained.others + LEAST_GAIN:
        yield (
            f"warning: the map does not tell speakers apart: with the new embeddings of other speakers the cosine is "
            f"{trained.others:.3f}; see that equal names in {old} and {new} are the same recordings, and "
            "that there are enough speakers"
        )
    yield f"{out}/: {DESCRIPTION}, {WEIGHTS}; maps from {made.old.name} to {made.new.name}"


def _check_replaced(out: Path, old: Model, new: Model) -> None:
    """Check that a folder holds no map between other models. Raises UsageError: it does."""
    try:
        there = load_map(out)
    except SpkdError:  # none, or a damaged one
        return
    if (there.old.digest, there.new.digest) != (old.digest, new.digest):
        raise UsageError(
            f"{out}: holds a map from {there.old.name} to {there.new.name}; choose another folder (out=FOLDER), or "
            "remove it"
        )


def _model(cache: Cache) -> Model:
    vad = cache.card.views.vad
    return Model(
        cache.card.teacher, None if vad is None else str(vad), cache.dim(EMBEDDING) if EMBEDDING in cache.names else 1
    )


def speakers_aside(pairs: Pairs, share: float, seed: int) -> np.ndarray:
    """(N,): whether a view is of a speaker who is kept aside.

    Raises:
        UsageError: there is one speaker only.
    """
    speakers = int(pairs.speaker.max()) + 1
    if speakers < 2:
        raise UsageError("the views in both caches are of one speaker; a map takes two, one of whom is kept aside")
    count = min(max(round(share * speakers), 1), speakers - 1)
    return np.isin(pairs.speaker, random_state(Purpose.MAP, seed, 1).permutation(speakers)[:count])


def fit(
    old: Model, new: Model, pairs: Pairs, aside: np.ndarray, config: MapConfig, fingerprints: list[str]
) -> EmbeddingMap:
    """Train a map on the pairs that are not kept aside.

    It begins as the linear map with the least squares (ridge regression, with the penalty that is best for the pairs
    kept aside) and goes on by AdamW, on the squared distances from the new model's embeddings of length 1. The weights
    with which the pairs kept aside have the greatest mean cosine are kept. Least squares draw what they cannot predict
    towards the mean, and embeddings near the mean are alike: the spread around it is then made that of the new model's
    embeddings, which lowers error rates.

    The idea is that of Gao et al., "Post-training embedding alignment for decoupling enrollment and runtime speaker
    recognition models" (NESSA, arXiv 2401.12440): a light network, trained on the embeddings of both models. The
    network and its loss are ours.

    Args:
        aside: (N,) whether a pair is kept aside.
        fingerprints: those of both caches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(Purpose.MAP, config.seed, 2))
        network = MapNetwork(old.width, new.width, config.hidden)
    fitted, kept = (as_tensors(pairs, chosen) for chosen in (~aside, aside))
    begin_linear(network, fitted, kept)
    step = train(network, fitted, kept, config.steps, config.seed)
    _restore_spread(network, *kept)
    before = functional.cosine_similarity(kept[0], kept[1]).mean().item() if old.width == new.width else None
    trained_on = TrainedOn(
        old=fingerprints[0],
        new=fingerprints[1],
        views=len(pairs),
        speakers=int(pairs.speaker.max()) + 1,
        kept_aside=len(np.unique(pairs.speaker[aside])),
        before=before,
        after=cosine(network, kept),
        others=_with_others(network, kept[0], fitted[1]),
        steps=step,
        seed=config.seed,
    )
    return EmbeddingMap.of(old, new, config.hidden, trained_on, pairs.people, network)


def as_tensors(pairs: Pairs, chosen: np.ndarray) -> Both:
    """Old and new embeddings of the chosen pairs."""
    return torch.from_numpy(pairs.old[chosen]), torch.from_numpy(pairs.new[chosen])


def train(network: torch.nn.Module, fitted: Both, kept: Both, steps: int, seed: int) -> int:
    """Train a network as `fit` does, and leave it with the weights that are best for the pairs kept aside.

    Args:
        network: network from old embeddings (N, D_old) to new ones (N, D_new).
        fitted: embeddings on which it is trained.
        kept: embeddings that are kept aside.
        steps: most steps.
    Returns:
        The step of these weights; 0: those that it began with.
    """
    best, best_step, highest = copy.deepcopy(network.state_dict()), 0, cosine(network, kept)
    generator = torch.Generator().manual_seed(seed_of(Purpose.MAP, seed, 2))
    optimiser = torch.optim.AdamW(network.parameters(), RATE)
    with track("map", steps, "steps") as bar:
        for step in range(1, steps + 1):
            rows = torch.randint(len(fitted[0]), (BATCH,), generator=generator)
            aims = functional.normalize(fitted[1][rows], dim=1)
            loss = (network(fitted[0][rows]) - aims).square().sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % CHECK == 0 or step == steps:
                reached = cosine(network, kept)
                bar.advance(step - bar.done, f"cosine {reached:.4f}")
                if reached > highest:
                    best, best_step, highest = copy.deepcopy(network.state_dict()), step, reached
                elif step - best_step >= PATIENCE * CHECK:
                    break
    network.load_state_dict(best)
    return best_step


def begin_linear(network: MapNetwork, fitted: Both, kept: Both) -> None:
    """Make a network the linear map of the least squares, with the penalty that is best for the pairs kept aside."""
    tried: dict[float, float] = {}
    for ridge in RIDGES:
        _make_linear(network, linear(*fitted, ridge))
        tried[ridge] = cosine(network, kept)
    _make_linear(network, linear(*fitted, max(tried, key=lambda ridge: tried[ridge])))


def linear(old: torch.Tensor, new: torch.Tensor, ridge: float) -> torch.Tensor:
    """Linear map (with an offset) of the least squares between embeddings divided by their lengths.

        W = argmin ||[X 1] W - Y||^2 + ridge ||W||^2

    Args:
        old: (N, D_old) embeddings.
        new: (N, D_new) embeddings.
    Returns:
        (D_old + 1, D_new) float64; the last row is the offset.
    """
    x, y = (functional.normalize(side.double(), dim=1) for side in (old, new))
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return torch.linalg.solve(x.mT @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y)


def _make_linear(network: MapNetwork, solution: torch.Tensor) -> None:
    """Make the network a linear map, to which the hidden layer adds nothing yet."""
    with torch.no_grad():
        network.linear.weight.copy_(solution[:-1].mT)
        network.linear.bias.copy_(solution[-1])
        if hasattr(network, "outer"):
            network.outer.weight.zero_()
            network.outer.bias.zero_()


def _restore_spread(network: MapNetwork, old: torch.Tensor, new: torch.Tensor) -> None:
    """Let mapped embeddings be as far from their mean as those of the new model are from theirs.

    f(x) becomes m + a (f(x) - m), where m is the mean of y, a^2 = sum |y - m|^2 / sum |f(x) - mean f(x)|^2, and y are
    the new model's embeddings divided by their lengths.
    """
    with torch.no_grad():
        mapped, y = network(old), functional.normalize(new, dim=1)
        mean = y.mean(0)
        ratio = (y - mean).square().sum() / (mapped - mapped.mean(0)).square().sum().clamp_min(1e-12)
        scale = ratio.sqrt().clamp(1.0, MOST_SPREAD)
        network.linear.weight.mul_(scale)
        network.linear.bias.sub_(mean).mul_(scale).add_(mean)
        if hasattr(network, "outer"):
            network.outer.weight.mul_(scale)
            network.outer.bias.mul_(scale)


def _with_others(network: torch.nn.Module, old: torch.Tensor, new: torch.Tensor) -> float:
    """Mean cosine of mapped embeddings with each new embedding of other speakers."""
    with torch.inference_mode():
        mapped, others = functional.normalize(network(old), dim=1), functional.normalize(new, dim=1)
        return float(mapped.mean(0) @ others.mean(0))


def cosine(network: torch.nn.Module, pairs: Both) -> float:
    """Mean cosine of mapped with new embeddings."""
    with torch.inference_mode():
        return float(functional.cosine_similarity(network(pairs[0]), pairs[1]).mean())
