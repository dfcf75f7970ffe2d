"""The protocol of a probe: choose feature and hyper-parameters on held-out training images, measure once on the validation set.

`sweep` and `choose` do not get a validation set. `validate` gets final choices and is the only function that reads validation
images.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from ebt_vision.core.atomic_files import write_text
from ebt_vision.data.lazy_images import LazyImages
from ebt_vision.data.sources import DataError
from ebt_vision.probing.extraction import FeatureMaker, open_features
from ebt_vision.probing.feature_cache import FeatureCache
from ebt_vision.probing.features import Feature, FeatureCondition
from ebt_vision.probing.heads import Head, ProbeSet, Trial
from ebt_vision.probing.labels import stratified_split
from ebt_vision.probing.report import Swept
from ebt_vision.probing.scores import ClassifierScores, measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A feature that heads may choose: layers, possibly concatenated, under one condition."""

    condition: FeatureCondition
    layer: str
    layers: tuple[str, ...]
    pool: str
    """mean, max or attention."""

    @property
    def stored_pool(self) -> str:
        """The pool in the cache: attention pooling is trained, so it needs all tokens."""
        return "tokens" if self.pool == "attention" else self.pool

    @property
    def stored(self) -> list[Feature]:
        """The features in the cache."""
        return [Feature(condition=self.condition, layer=layer, pool=self.stored_pool) for layer in self.layers]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """Images, their labels and the names of all classes."""

    images: LazyImages
    labels: np.ndarray  # int64 (n,)
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Settings of the choice."""

    maker: FeatureMaker
    trials_folder: Path
    """Folder of trials, named by everything that they depend on, so that an interrupted sweep resumes."""
    held_out: float = 0.1
    """Fraction of each class of the training images that is held out for choices."""
    num_views: int = 0
    """Number of random crops of each training image, for heads that train on them."""
    seed: int = 0
    say: Callable[[str], None] = print


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """The results of every head on every candidate."""

    entries: tuple[Swept, ...]
    num_images: int
    num_held_out: int
    num_unreadable: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The choice of one head, before the validation set is used."""

    head: Head
    candidate: Candidate
    trial: Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class Validated:
    """The figures of a choice on the validation set."""

    choice: Choice
    measured: ClassifierScores
    labels: np.ndarray  # int64, of the readable images
    num_unreadable: int
    dimensions: tuple[int, ...]
    seconds: float


def all_features(candidates: Sequence[Candidate]) -> list[Feature]:
    """Return the cached features of all candidates, each once."""
    return list(dict.fromkeys(feature for candidate in candidates for feature in candidate.stored))


def make_training_features(protocol: Protocol, train: LabelledImages, features: Sequence[Feature]) -> list[FeatureCache]:
    """Return the complete caches of the centred squares and of each random view."""
    return [protocol.maker.make(train.images, "train", features, view) for view in range(protocol.num_views + 1)]


def check_sizes(protocol: Protocol, candidates: Sequence[Candidate], heads: Sequence[Head], num_images: int) -> None:
    """Raise ValueError, before any extraction, if a head could not be fitted on all training images with some candidate."""
    shapes = protocol.maker.shapes(all_features(candidates))
    for head, candidate in product(heads, candidates):
        if head.accepts(candidate.stored_pool):
            head.check_size(num_images, sum(math.prod(shapes[feature]) for feature in candidate.stored))


def sweep(protocol: Protocol, train: LabelledImages, candidates: Sequence[Candidate], heads: Sequence[Head]) -> SweepResult:
    """Measure every head on every candidate that it accepts, on held-out training images."""
    caches = make_training_features(protocol, train, all_features(candidates))
    readable = caches[0].readable()
    fit, held_out = stratified_split(train.labels, readable, protocol.held_out, protocol.seed, train.class_names)
    entries = []
    for head, candidate in product(heads, candidates):
        if not head.accepts(candidate.stored_pool):
            continue
        path = _trials_path(protocol, train, head, candidate)
        if path.exists():
            trials = [Trial(**record) for record in json.loads(path.read_text())]
        else:
            trials = head.sweep(_probe_set(caches, candidate, train), fit, held_out)
            write_text(path, json.dumps([asdict(trial) for trial in trials]))
        condition, layer, pool = candidate.condition, candidate.layer, candidate.pool
        entry = Swept(head=head.name, condition=condition, layer=layer, pool=pool, trials=tuple(trials))
        protocol.say(f"{head.name}, {condition.name} {layer} {pool}: held-out top-1 {100 * entry.best.top1:.2f} %")
        entries.append(entry)
    return SweepResult(
        entries=tuple(entries),
        num_images=len(train.labels),
        num_held_out=len(held_out),
        num_unreadable=int((~readable).sum()),
    )


def choose(
    protocol: Protocol,
    swept: SweepResult,
    candidates: Sequence[Candidate],
    head: Head,
    whole: LabelledImages | None = None,
) -> Choice:
    """Return the best feature of a head with its best setting; if the sweep used a part, the setting is chosen again on
    `whole`."""
    of_head = [entry for entry in swept.entries if entry.head == head.name]
    best = max(of_head, key=lambda entry: (entry.best.top1, entry.best.top5))
    (found,) = (c for c in candidates if (c.condition, c.layer, c.pool) == (best.condition, best.layer, best.pool))
    if whole is not None:
        (best,) = sweep(protocol, whole, [found], [head]).entries
    return Choice(head=head, candidate=found, trial=best.best)


def validate(protocol: Protocol, train: LabelledImages, choice: Choice, val: LabelledImages) -> Validated:
    """Fit a choice on all training images, including held-out ones, and measure it on the validation images."""
    begin = time.perf_counter()
    caches = make_training_features(protocol, train, choice.candidate.stored)
    data = _probe_set(caches, choice.candidate, train)
    cache = protocol.maker.make(val.images, "val", choice.candidate.stored)
    usable = np.flatnonzero(cache.readable())
    if not len(usable):
        raise DataError(f"no validation image of {val.images.config.path} can be read; check the files")
    fit = np.flatnonzero(caches[0].readable())
    features = open_features(cache, choice.candidate.stored)
    scores = choice.head.predict(data, fit, choice.trial.hyper, features, usable)
    return Validated(
        choice=choice,
        measured=measure(scores, val.labels[usable]),
        labels=val.labels[usable],
        num_unreadable=len(val.labels) - len(usable),
        dimensions=data.views[0].shape[1:],
        seconds=time.perf_counter() - begin,
    )


def _probe_set(caches: Sequence[FeatureCache], candidate: Candidate, train: LabelledImages) -> ProbeSet:
    views = tuple(open_features(cache, candidate.stored) for cache in caches)
    return ProbeSet(views=views, labels=train.labels, num_classes=len(train.class_names))


def _trials_path(protocol: Protocol, train: LabelledImages, head: Head, candidate: Candidate) -> Path:
    config = train.images.config
    key = {
        "head": [head.name, head.settings],
        "features": [feature.name for feature in candidate.stored],
        "made_by": protocol.maker.identity,
        "data": [train.images.fingerprint, config.split, config.image_column, config.limit, config.img_size],
        "labels": hashlib.sha256(train.labels.tobytes()).hexdigest(),
        "protocol": [protocol.held_out, protocol.num_views, protocol.seed],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{head.name}-{candidate.condition.name}-{candidate.layer}-{candidate.pool}-{digest}.json"
    return protocol.trials_folder / name
